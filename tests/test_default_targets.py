# SPDX-License-Identifier: Apache-2.0
"""Which layers are adapted where none are named, and what is said of those that cannot be."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from adapters import context_of
from conftest import make_llama
from family_checks import IDS, adapted, gap, logits
from peft import PeftModel, get_peft_model
from tiny_families import tiny_config, tiny_model
from torch import nn
from transformers import BertModel, LlamaForCausalLM, MistralForSequenceClassification

from alter_peft import AlterConfig
from alter_peft.tuner.export import export_to_lora
from alter_peft.tuner.layer import AlterLinear
from alter_peft.tuner.probe import uses_of_layers


KV = "self_attn.kv_b_proj"


def names(model: nn.Module) -> set[str]:
    """The adapted layers, without their layer's number."""
    found = [name for name, module in model.named_modules() if isinstance(module, AlterLinear)]
    return {re.sub(r"^.*\.layers?\.\d+\.", "", name) for name in found}


# PEFT's table for LoRA has none of them, or has attention alone
@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "granite", "olmo2", "cohere", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("router", ["context", "static"])
def test_every_decoder_has_all_linear_layers(family, router, caplog):
    base = tiny_model(family)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    model = get_peft_model(base, AlterConfig(router=router))
    assert names(model) == {re.sub(r"^.*\.layers\.\d+\.", "", name) for name in linear}
    layers = {int(found) for found in re.findall(r"layers\.(\d+)\.\S*\.alter_A", " ".join(model.state_dict()))}
    assert layers == ({2, 3} if router == "context" else {0, 1, 2, 3})
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: BertModel(tiny_config("bert")), {"attention.self.query", "attention.self.value"}),
        (lambda: MistralForSequenceClassification(tiny_config("mistral")), {"self_attn.q_proj", "self_attn.v_proj"}),
    ],
)
def test_other_models_have_lora_s_defaults(make, expected):
    """BERT's pooler, for one, has no part in its features, and would get no gradient."""
    assert names(get_peft_model(make(), AlterConfig(router="static"))) == expected


def test_layers_without_a_token_of_their_own_are_left_out_and_said(caplog, tmp_path):
    """DeepSeek's `kv_b_proj` is run on all that is cached, (B, 1, cached length)."""
    with caplog.at_level(logging.WARNING):
        model = adapted(tiny_model("deepseek_v3"))
    assert len(caplog.records) == 1
    assert re.search(rf"left out.*{KV} \(inputs of shape \(5, 1, 7\) where rows and tokens are \(5, 7\)", caplog.text)
    assert model.peft_config["default"].exclude_modules == {KV}
    assert names(model) >= {"self_attn.o_proj", "mlp.shared_experts.up_proj"} and KV not in names(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    PeftModel.from_pretrained(tiny_model("deepseek_v3"), tmp_path)
    assert not caplog.records
    assert KV in names(get_peft_model(tiny_model("deepseek_v3"), AlterConfig(router="static")))


@pytest.mark.parametrize("targets", [["kv_b_proj", "o_proj"], r".*\.(kv_b|o)_proj"])
def test_layers_without_a_token_of_their_own_that_are_named_raise(targets):
    base = tiny_model("deepseek_v3")
    with pytest.raises(ValueError, match=rf"takes layers of Deep.*{KV}.*`exclude_modules=\['{KV}'\]`, or .*'static'"):
        get_peft_model(base, AlterConfig(target_modules=targets))
    assert not any(isinstance(module, AlterLinear) for module in base.modules())  # as it was
    model = get_peft_model(base, AlterConfig(target_modules=targets, exclude_modules=[KV]))
    assert "self_attn.o_proj" in names(model) and KV not in names(model)


@pytest.mark.parametrize("own", [["o_proj"], r".*\.o_proj"])
def test_what_is_left_out_adds_to_what_is_excluded(own):
    model = get_peft_model(tiny_model("deepseek_v3"), AlterConfig(exclude_modules=own))
    assert not {KV, "self_attn.o_proj"} & names(model) and "self_attn.kv_a_proj_with_mqa" in names(model)


def test_flattened_tokens_are_gated_as_rows():
    """Those of Qwen2-MoE's shared expert."""
    model = adapted(tiny_model("qwen2_moe"))
    shared = [m for n, m in model.named_modules() if isinstance(m, AlterLinear) and ".shared_expert." in n]
    assert len(shared) == 6 and all(layer.flattens for layer in shared)
    expected = logits(model)
    assert gap(logits(model, IDS[1:2]), expected[1:2]) < 1e-4
    with context_of(model).supply(owner=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])):
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    for layer in shared:
        grads = {
            name: p.grad is not None and bool(p.grad.any()) for name, p in layer.alter_B["default"].named_parameters()
        }
        assert grads == {"retain": True, "forget_0": True, "forget_1": False}


def test_what_a_layer_is_used_for_is_found_without_weights():
    with torch.device("meta"):
        base = tiny_model("mamba")
    uses = uses_of_layers(base).layers
    assert uses["backbone.layers.0.mixer.dt_proj"].is_read and not uses["backbone.layers.0.mixer.in_proj"].is_read
    assert uses["backbone.layers.0.mixer.in_proj"].is_by_token
    router = uses_of_layers(tiny_model("llama4_text")).layers["model.layers.1.feed_forward.router"]
    assert router.is_flattened and not router.is_linear
    assert uses_of_layers(tiny_model("zamba2")).own_memory is None
    assert uses_of_layers(tiny_model("rwkv")).own_memory == "state"


class DependsOnValues(LlamaForCausalLM):
    """Stands for a model that cannot be run without weights: from the start, or from a cache."""

    def __init__(self, config):
        super().__init__(config)
        self.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, module, args, kwargs):
        if self.lm_head.weight.is_meta and (self.config.from_the_start or kwargs["use_cache"]):
            self.lm_head.weight.numpy()


@pytest.mark.parametrize(
    ("from_the_start", "said"),
    [
        (True, ("does with its linear layers", "are not left out", "'static'")),
        (False, ("does from a cache", "'static'")),
    ],
)
def test_what_could_not_be_found_out_is_a_warning(from_the_start, said, caplog):
    """Else what is refused for other models would be lost without a word."""
    config = tiny_config("llama")
    config.from_the_start = from_the_start
    with caplog.at_level(logging.WARNING):
        get_peft_model(DependsOnValues(config), AlterConfig())
    assert len(caplog.records) == 1
    for part in ("DependsOnValues", "could not be found out", "router", *said):
        assert part in caplog.text


def test_nothing_is_said_where_it_is_known_what_works(caplog):
    with caplog.at_level(logging.WARNING):
        assert not uses_of_layers(tiny_model("xmod")).layers
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gemma3n_text", r"its layers are given \(4, 5, 7, 32\) for \(batch, length, width\) = \(5, 7, 32\)"),
        ("rwkv", "it generates from a memory of its own"),
        ("reformer", "its layers are reversible"),
    ],
)
def test_decoders_that_no_router_can_follow_raise_at_once(family, why):
    with pytest.raises(ValueError, match=rf"cannot follow \w+: {why}.*router='static'"):
        get_peft_model(tiny_model(family), AlterConfig())


def test_a_decoder_that_reads_in_both_directions_raises():
    config = tiny_config("bert")
    adapted(tiny_model("bert"))  # set up as a decoder
    config.is_decoder = False
    model = type(tiny_model("bert"))(config)
    with pytest.raises(ValueError, match=r"reads in both directions, .*`is_decoder=True`.*router='static'"):
        get_peft_model(model, AlterConfig())


def test_gemma_4_s_last_layers_see_the_whole_prompt():
    """They share the keys of earlier ones, and drop the tokens that no logits are asked of."""
    model = adapted(tiny_model("gemma4_text"))
    whole = logits(model)
    gates = context_of(model).state.gates["default"]
    with torch.no_grad():
        last = model(input_ids=IDS, logits_to_keep=1, use_cache=False).logits
    assert last.shape[1] == 1 and torch.equal(context_of(model).state.gates["default"], gates)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: tiny_model("zamba2"), None),
        (lambda: make_llama(384, tie_word_embeddings=True), ["lm_head"]),
    ],
    ids=["tied blocks", "tied head"],
)
def test_weights_that_layers_share_are_not_merged(make, targets, tmp_path):
    model = adapted(make(), router="static", target_modules=targets)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"have one weight in common, .*Keep the adapter unmerged"):
            merge()
    assert torch.equal(logits(model), expected)
    if targets is None:  # of the head PEFT's own LoRA warns
        export_to_lora(model, tmp_path)
        assert gap(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), expected) < 1e-4
