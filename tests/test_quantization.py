# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from attacked_models import FORGET, KINDS, alter, assert_unchanged, lora, model_of, prompt, snapshot
from conftest import make_llama
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from alter_peft.evaluation import Key, Rows
from alter_peft.evaluation.attacks.quantization import (
    FORMATS,
    merged,
    merged_quantization,
    quantization,
    quantize_dequantize,
    quantized,
    why_not_merged,
)
from alter_peft.evaluation.base_weights import base_parameters
from alter_peft.tuner.export import export_to_lora


ROWS = Rows(FORGET)


# ---- quantize_dequantize --------------------------------------------------------------------------------------------


def test_four_bits_by_hand():
    """The largest of a row is 7 steps."""
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [-14.0, 2.9, 1.1, 0.9], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [-14.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(quantize_dequantize(weight, 4), expected)


def test_groups_have_scales_of_their_own():
    weight = torch.tensor([[7.0, 0.6, 0.07, 0.006, 0.5]])
    expected = torch.tensor([[7.0, 1.0, 0.07, 0.01, 0.5]])  # the last group is smaller
    torch.testing.assert_close(quantize_dequantize(weight, 4, group_size=2), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 64, 50])
def test_against_the_formula(bits, group_size):
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    limit, values = 2 ** (bits - 1) - 1, weight.double().numpy()
    expected = np.empty_like(values)
    size = group_size or values.shape[1]
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], size):
            group = values[row, start : start + size]
            scale = np.abs(group).max() / limit
            expected[row, start : start + size] = np.rint(group / scale) * scale
    found = quantize_dequantize(weight, bits, group_size).double().numpy()
    # float32 may round the other way where a weight lies halfway
    assert (np.abs(found - expected) > 1e-6).mean() < 0.002
    assert len(np.unique(found[0, :size].round(7))) <= 2 * limit + 1
    assert np.abs(found).max() == pytest.approx(np.abs(values).max(), rel=1e-5)


def test_the_dtype_is_kept():
    assert quantize_dequantize(torch.randn(4, 8).bfloat16(), 8).dtype == torch.bfloat16


# ---- quantized ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_linear_base_weights_alone_are_rounded(kind, tied):
    model = KINDS[kind](make_llama(64, tie_word_embeddings=tied))
    before = snapshot(model)
    rounded = quantized(model, 4, 64)
    assert_unchanged(model, before)
    base = {id(parameter) for parameter in base_parameters(rounded)}
    for name, parameter in rounded.named_parameters():
        is_linear = id(parameter) in base and "_proj" in name
        expected = quantize_dequantize(before[name], 4, 64) if is_linear else before[name]
        assert torch.equal(parameter, expected), name
        assert torch.equal(parameter, before[name]) == (not is_linear), name


def test_a_conv1d_has_its_outputs_in_columns():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    rounded = quantized(model, 8)
    before, after = (m.transformer.h[0].mlp.c_fc.weight for m in (model, rounded))
    assert torch.equal(after, quantize_dequantize(before.T, 8).T) and not torch.equal(after, before)


def mixture() -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=3, **sizes)
    return MixtralForCausalLM(config)


def test_experts_of_a_mixture_are_rounded_one_by_one():
    model = mixture()
    before = snapshot(model)
    rounded = quantized(model, 4, 16)
    assert_unchanged(model, before)
    seen = 0
    for name, parameter in rounded.named_parameters():
        if ".experts." in name:
            seen += 1
            for expert, own in zip(parameter, before[name], strict=True):
                found = quantize_dequantize(own, 4, 16)
                assert torch.equal(expert, found) and not torch.equal(found, own)
    assert seen


def test_experts_of_inputs_by_outputs_are_turned():
    model = mixture()
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True
    for name, parameter in quantized(model, 4, 16).named_parameters():
        if ".experts." in name:
            own = model.get_parameter(name)
            for expert, weight in zip(parameter, own, strict=True):
                assert torch.equal(expert, quantize_dequantize(weight.T, 4, 16).T), name


def test_experts_of_unknown_form_are_refused():
    model = mixture()
    del model.model.layers[1].mlp.experts.is_transposed
    with pytest.raises(ValueError, match=r"the experts 'model.layers.1.mlp.experts.gate_up_proj', a MixtralExperts"):
        quantized(model, 4)


def test_a_model_without_linear_layers(tokenizer):
    model = make_llama(64)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="LlamaForCausalLM without linear layers"):
        quantized(model, 8)


# ---- merged ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(4, 16).unsqueeze(0)).logits


@pytest.mark.parametrize("kind", ["plain", "lora", "static"])
def test_a_merge_says_what_the_adapter_says(kind, tokenizer):
    model = model_of(kind, tokenizer)
    before = snapshot(model)
    assert why_not_merged(model) is None
    found = merged(model)
    assert not isinstance(found, PeftModel) and found is not model
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-3)
    assert_unchanged(model, before)


def test_a_gated_adapter_is_not_merged(tokenizer):
    model = model_of("gated", tokenizer)
    assert "gates every token" in why_not_merged(model)
    with pytest.raises(ValueError, match=r"gates every token by itself \(`router`='context'\).*`expert_weights`"):
        merged(model)


@pytest.mark.parametrize("kind", ["gated", "static"])
def test_an_adapter_is_folded_at_given_weights(kind, tokenizer, tmp_path):
    model = model_of(kind, tokenizer)
    before, own = snapshot(model), logits(model)
    found = merged(model, expert_weights=[0.5, 2.0])
    assert not isinstance(found, PeftModel)
    assert_unchanged(model, before)
    export_to_lora(model, tmp_path, expert_weights=[0.5, 2.0])
    folded = PeftModel.from_pretrained(make_llama(len(tokenizer)), tmp_path)
    torch.testing.assert_close(logits(found), logits(folded), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(found), own, rtol=1e-2, atol=1e-2)
    assert torch.equal(logits(model), own)


def test_a_prompt_is_not_merged():
    model = prompt(make_llama(64))
    assert "is a prompt" in why_not_merged(model)
    with pytest.raises(ValueError, match="is a prompt"):
        merged(model)


def test_any_gated_adapter_that_is_active_counts():
    model = alter(make_llama(64), router="static")
    model.add_adapter("second", alter(make_llama(64)).peft_config["default"])
    assert why_not_merged(model) is None
    model.set_adapter("second")
    assert "'second'" in why_not_merged(model)


# ---- the attacks ----------------------------------------------------------------------------------------------------


def numbers(scores) -> list[list[float]]:
    return [score.rows for score in scores]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_measured(kind, tokenizer):
    model = model_of(kind, tokenizer)
    found = quantization(model, tokenizer, ROWS._replace(answered=2))
    assert list(FORMATS) == [8, 4]
    assert [score.key for score in found] == [
        Key(f"forget, {bits} bits", metric, "quantization") for bits in (8, 4) for metric in ("probability", "rouge")
    ]
    assert [len(score.rows) for score in found] == [5, 2, 5, 2]
    plain = quantization(model, tokenizer, ROWS, ["probability"])
    assert plain == found[::2] and plain[0].rows != plain[1].rows


def test_a_merge_is_rounded_as_a_whole(tokenizer):
    model = lora(make_llama(len(tokenizer)))
    found = merged_quantization(model, tokenizer, ROWS, ["probability"])
    assert [score.key for score in found] == [
        Key(f"forget, {bits} bits", "probability", "merged_quantization") for bits in (8, 4)
    ]
    expected = quantization(merged(model), tokenizer, ROWS, ["probability"])
    assert numbers(found) == numbers(expected)
    assert numbers(found) != numbers(quantization(model, tokenizer, ROWS, ["probability"]))


def test_the_merge_of_a_plain_model_is_itself(tokenizer):
    model = model_of("plain", tokenizer)
    one, other = (attack(model, tokenizer, ROWS, ["probability"]) for attack in (merged_quantization, quantization))
    assert numbers(one) == numbers(other)
