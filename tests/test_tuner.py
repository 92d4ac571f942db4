# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alter_peft import AlterConfig
from alter_peft.entropy import tsallis_entropy
from alter_peft.tuner.layer import AlterLinear
from alter_peft.tuner.token_router import AlterRouter


VOCAB = 120
# Gated adapters, in every place where S_q can come from
MODES = [
    {"router": "context", "inference_entropy": "none"},
    {"router": "context", "inference_entropy": "base"},
    {"router": "entropy"},
]
modes = pytest.mark.parametrize("mode", MODES, ids=["context", "context-base", "entropy"])
# 3 rows, the first two padded on the left
IDS = torch.randint(4, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[1, :1] = 0


def small(config_cls, model_cls):
    config = config_cls(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return model_cls(config)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    )


MAKERS = {
    "llama": lambda: make_llama(VOCAB),
    "gpt2": gpt2,
    "mistral": lambda: small(MistralConfig, MistralForCausalLM),
    "qwen2": lambda: small(Qwen2Config, Qwen2ForCausalLM),
}


@cache
def _base(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[family]().eval()


def base_model(family: str = "llama"):
    return copy.deepcopy(_base(family))


def config(**arguments) -> AlterConfig:
    defaults = {"num_forget_experts": 2, "init_weights": False, "entropy_threshold": 0.8, "task_type": "CAUSAL_LM"}
    return AlterConfig(**{**defaults, **arguments})


def adapted(family: str = "llama", **arguments) -> PeftModel:
    """A random adapter on a random model: gates and experts that matter."""
    model = base_model(family)
    torch.manual_seed(1)
    return get_peft_model(model, config(**arguments)).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def context_of(model: nn.Module):
    return next(module.context for module in model.modules() if isinstance(module, AlterLinear))


# Promises of a forward pass


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("mode", [*MODES, {"router": "static"}], ids=["context", "context-base", "entropy", "static"])
def test_fresh_adapter_is_the_base_bit_for_bit(family, mode):
    expected = logits(base_model(family))
    model = adapted(family, init_weights=True, **mode)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(adapted(family, **mode)), expected)  # so that equality says something


@modes
def test_neighbours_and_padding_never_change_an_example(mode):
    model = adapted(**mode)
    example = IDS[2:, :8]
    expected = logits(model, example, torch.ones(1, 8))
    torch.testing.assert_close(logits(model, example, None), expected)
    noise = torch.randint(4, VOCAB, (1, 5))
    ones, zeros = torch.ones(1, 8), torch.zeros(1, 5)
    left = logits(model, torch.cat([noise, example], 1), torch.cat([zeros, ones], 1))[:, 5:]
    right = logits(model, torch.cat([example, noise], 1), torch.cat([ones, zeros], 1))[:, :8]
    batch = logits(model, torch.cat([IDS[:2, :8], example]), torch.ones(3, 8))[2:]
    later = logits(model, torch.cat([example, noise], 1), torch.ones(1, 13))[:, :8]
    for found in (left, right, batch, later):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@modes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "strategy",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_generation_with_and_without_a_cache_is_the_same(family, mode, strategy):
    model = adapted(family, **mode)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(
            model.generate(
                input_ids=IDS, attention_mask=MASK, max_new_tokens=12, use_cache=use_cache, eos_token_id=None,
                pad_token_id=0, **strategy,
            )
        )  # fmt: skip
    assert torch.equal(*found)


@modes
def test_prompt_lookup_crops_the_router_s_state_too(mode):
    model = adapted(**mode)
    ids = IDS[2:, :6].repeat(1, 3)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 15, "do_sample": False}
    plain = model.generate(**arguments, use_cache=True)
    assert torch.equal(model.generate(**arguments, prompt_lookup_num_tokens=3), plain)


@modes
def test_cached_steps_equal_one_pass(mode):
    model, cache = adapted(**mode), DynamicCache()
    expected = logits(model)
    pieces = []
    with torch.no_grad():
        for start, stop in [(0, 6), (6, 7), (7, 12)]:
            out = model(
                input_ids=IDS[:, start:stop], attention_mask=MASK[:, :stop], past_key_values=cache, use_cache=True
            )
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[MASK.bool()], expected[MASK.bool()], atol=2e-4, rtol=1e-4)


@modes
def test_disabling_restores_the_base(mode):
    model = adapted(**mode)
    expected, changed = logits(base_model()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), changed) and not torch.equal(changed, expected)


def test_base_entropy_is_that_of_the_disabled_model():
    model = adapted(inference_entropy="base", entropy_q=1.5)
    logits(model)
    found = context_of(model).entropy
    with model.disable_adapter():
        expected = tsallis_entropy(logits(model), 1.5)
    torch.testing.assert_close(found, expected)
    assert (expected > 0.8).any() and (expected <= 0.8).any()


def test_base_entropy_is_that_of_the_original_modules():
    model = adapted(inference_entropy="base", modules_to_save=["lm_head", "norm"])
    saved = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert saved
    with torch.no_grad():
        for parameter in saved.values():
            parameter.mul_(1.5)
    changed = logits(model)
    found = context_of(model).entropy
    with model.disable_adapter():
        expected = tsallis_entropy(logits(model), 1.5)
    torch.testing.assert_close(found, expected)
    assert torch.equal(logits(model), changed) and all(parameter.requires_grad for parameter in saved.values())
    assert not torch.allclose(tsallis_entropy(changed, 1.5), expected, atol=1e-3)


def test_base_entropy_is_taken_of_the_model_in_eval_mode():
    model = adapted("gpt2", inference_entropy="base")  # GPT-2 has dropout
    logits(model)
    expected = context_of(model).entropy
    model.train()
    logits(model)
    torch.testing.assert_close(context_of(model).entropy, expected)
    assert model.training and all(module.training for module in model.modules())


@modes
def test_every_token_is_gated(mode):
    model = adapted(**mode)
    logits(model)
    gates = context_of(model).state.gates["default"]
    assert gates.shape == (3, 12, 3)
    experts = set(context_of(model).competing("default").argmax(-1).flatten().tolist())
    if mode["router"] == "entropy":
        assert torch.equal(gates[..., 0], torch.ones(3, 12))
        gates = gates[..., 1:]
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 12))
    if mode["router"] == "entropy":
        assert len(experts) == 1  # the letter of Eq. 7: a positive scalar cannot choose between experts
    else:
        assert len(experts) > 1


# Training


def gradients(model: PeftModel, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@modes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(family, mode):
    torch.manual_seed(4)
    batches = [torch.randint(4, VOCAB, (2, 9)), torch.randint(4, VOCAB, (2, 9))]
    model = adapted(family, **mode).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, batches)
    assert expected
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    found = gradients(model, batches)  # both forward passes precede both backward passes
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_what_is_trainable():
    model = adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".alter_A." in name or ".alter_B." in name for name in trainable)
    assert all(int(name.split(".layers.")[1].split(".")[0]) >= 2 for name in trainable)
    assert trainable == set(gradients(model.train(), [IDS]))


def test_gradients_reach_the_owned_experts_alone():
    model = adapted(temperature_low=5.0).train()  # soft gates: every expert takes part in every row
    owner = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    plain = logits(model)
    with context_of(model).supply(owner=owner, learns_shared=False):
        out = model(input_ids=IDS, attention_mask=MASK)
        out.logits.square().mean().backward()
    torch.testing.assert_close(out.logits, plain)  # who learns changes no output
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.rsplit(".", 1)[1] for name in reached} == {"retain", "forget_0"}
    untouched = [
        p.grad for name, p in model.named_parameters() if name.endswith(("forget_1", "alter_A.default.weight"))
    ]
    assert untouched and all(gradient is None or not gradient.any() for gradient in untouched)


def test_each_expert_learns_from_its_own_rows():
    model = adapted(temperature_low=5.0, router_layer=3).train()  # the last layer: rows do not meet above it

    def grads(ids, owner):
        model.zero_grad()
        with context_of(model).supply(owner=owner):
            model(input_ids=ids).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    owner = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    both = grads(IDS[:2], owner)
    alone = grads(IDS[:1], owner[:1]), grads(IDS[1:2], owner[1:])
    for name in both:
        if name.endswith("down_proj.alter_B.default.forget_0"):
            torch.testing.assert_close(both[name], alone[0][name])
            assert both[name].any() and not alone[1][name].any()


def test_experts_and_shared_matrix_can_be_kept_from_learning():
    model = adapted().train()
    with context_of(model).supply(learns_experts=False):
        model(input_ids=IDS).logits.square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all(name.endswith("alter_A.default.weight") for name in reached)


# Saving and loading


LOAD = """
import sys, torch, alter_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter").eval()
given = torch.load(folder + "/given.pt")
with torch.no_grad():
    found = model(input_ids=given["ids"], attention_mask=given["mask"]).logits
assert torch.equal(found, given["logits"]), (found - given["logits"]).abs().max()
print("equal")
"""


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    model = adapted(domains=["a", "b"])
    base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"ids": IDS, "mask": MASK, "logits": logits(model)}, tmp_path / "given.pt")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


def test_one_file_holds_router_and_experts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = {name: p for name, p in model.named_parameters() if "alter_" in name}
    assert len(saved) == len(own) == 2 * 7 * (1 + 3) + 4  # layers x linears x (A and 1+N experts), router
    for name, parameter in own.items():
        assert torch.equal(saved[name.replace(".default", "")], parameter)
    for key in saved:
        assert sum(part.startswith("alter_") for part in key.split(".")) == 1, key
        assert "default" not in key
    assert {key.split(".")[-1] for key in saved if "alter_B" in key} == {"retain", "forget_0", "forget_1"}
    of_router = {key.split(".")[-1] for key in saved if "alter_router" in key}
    assert of_router == {"weight", "bias", "hidden_weight", "hidden_bias"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("mode", [*MODES, {"router": "static"}], ids=["context", "context-base", "entropy", "static"])
def test_loading_gives_equal_logits(tmp_path, mode, low_cpu_mem_usage):
    model = adapted(**mode)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert all(p.device.type == "cpu" and not p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert [n for n, p in trainable.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": 3, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"entropy_quantile": 0.4, "entropy_threshold": None},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True, "lora_dropout": 0.1},
    ],
    ids=["regex", "layers", "modules_to_save", "quantile", "patterns"],
)
def test_every_kind_of_config_loads_again(tmp_path, arguments):
    model = adapted(**arguments)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_trained_biases_are_saved(tmp_path):
    model = adapted("gpt2", bias="alter_only")
    biases = {name: p for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(biases) == 2 * 4 and all(".base_layer." in name for name in biases)
    with torch.no_grad():
        for bias in biases.values():
            bias.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("gpt2"), tmp_path).eval()), logits(model))


def test_half_precision_base_keeps_a_float32_adapter():
    base = base_model().to(torch.bfloat16)
    expected = logits(base)
    model = get_peft_model(base, config(init_weights=True)).eval()
    assert logits(model).dtype == torch.bfloat16 and torch.equal(logits(model), expected)
    assert {p.dtype for name, p in model.named_parameters() if "alter_" in name} == {torch.float32}


def test_auto_peft_model(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_mixin(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    loaded = base_model()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(base_model()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), logits(model))

    added = base_model()
    torch.manual_seed(1)
    added.add_adapter(config())
    assert torch.equal(logits(added.eval()), logits(model))
    added.save_pretrained(tmp_path / "again")
    again = base_model()
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


def test_injecting_without_a_peft_model():
    base = base_model()
    torch.manual_seed(1)
    model = inject_adapter_in_model(config(), base).eval()
    assert torch.equal(logits(model), logits(adapted()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(copied):
    model = adapted(inference_entropy="base")
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    assert context_of(twin) is not context_of(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "alter_" in name:
                parameter.zero_()
    assert torch.equal(logits(twin), logits(base_model()))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_of_other_shapes_names_the_base(tmp_path, low_cpu_mem_usage):
    adapted().save_pretrained(tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**{**base_model().config.to_dict(), "hidden_size": 64, "head_dim": 16}))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "base_model_name_or_path": "some/base"}))
    with pytest.raises(ValueError, match=r"does not fit this base model: .* has shape .*'some/base'"):
        PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


# Several adapters, merging, unloading


@pytest.mark.parametrize("second", [{}, {"router_layer": 1}, {"router": "static"}], ids=["same", "lower", "static"])
def test_two_adapters(second):
    model = adapted()
    first_logits = logits(model)
    torch.manual_seed(2)
    model.add_adapter("second", config(**second))
    assert torch.equal(logits(model), first_logits)
    model.set_adapter("second")
    second_logits = logits(model)
    torch.manual_seed(2)
    assert torch.equal(second_logits, logits(get_peft_model(base_model(), config(**second)).eval()))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".second." in name for name in trainable)
    assert not any("router" in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), first_logits)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first_logits)
    assert not any(".second" in name for name, _ in model.named_parameters())
    assert all("second" not in router.config for router in model.modules() if isinstance(router, AlterRouter))


def test_deleting_the_active_adapter_leaves_the_other():
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("second", config())
    model.set_adapter("second")
    expected = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)


def test_two_active_adapters_add_up_and_generate_with_a_cache():
    model = adapted(router_layer=3, target_modules=["down_proj"])
    base, first = logits(base_model()), logits(model)
    torch.manual_seed(2)
    model.add_adapter("second", config(router_layer=1, target_modules=["q_proj"], num_forget_experts=3))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first) and not torch.allclose(both, base)
    arguments = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "max_new_tokens": 10,
        "do_sample": False,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(**arguments, use_cache=True), model.generate(**arguments, use_cache=False))
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_second_adapter_is_loaded_beside_the_first(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    torch.manual_seed(2)
    other = get_peft_model(base_model(), config(router_layer=1)).eval()
    other.load_adapter(tmp_path, adapter_name="loaded")
    other.set_adapter("loaded")
    assert torch.equal(logits(other), expected)


def test_deleting_the_last_adapter_restores_the_base():
    model = adapted()
    assert not torch.equal(logits(model), logits(base_model()))
    model.base_model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(base_model()))


@modes
def test_unload_leaves_nothing_behind(mode):
    model = adapted(**mode)
    names = [name for name, _ in base_model().named_modules()]
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(base_model()))
    assert [name for name, _ in unloaded.named_modules()] == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    torch.manual_seed(1)
    again = get_peft_model(unloaded, config(**mode)).eval()
    assert torch.equal(logits(again), logits(adapted(**mode)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_static_adapter_merges(family):
    model = adapted(family, router="static", expert_weights=[0.5, -1.0])
    expected, original = logits(model), logits(base_model(family))
    assert not torch.allclose(expected, original, atol=1e-2)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), original, atol=1e-3, rtol=1e-3)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)
    assert not any("alter" in name for name, _ in merged.named_parameters())


def test_merging_a_broken_adapter_safely_raises():
    model = adapted(router="static")
    layer = next(module for module in model.modules() if isinstance(module, AlterLinear))
    before = layer.get_base_layer().weight.clone()
    nn.init.constant_(layer.alter_B["default"].retain, float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@modes
def test_gated_adapter_refuses_to_merge(mode):
    model = adapted(**mode)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'default' gates every token by itself .*router='static'"):
            merge()
    assert torch.equal(logits(model), expected)


def test_merging_a_gated_adapter_that_is_not_active_raises():
    model = adapted(router="static")
    model.add_adapter("gated", config())
    with pytest.raises(ValueError, match="'gated' gates every token by itself"):
        model.merge_adapter(adapter_names=["default", "gated"])
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, AlterLinear))
    assert not context_of(model).routers[0].merged and torch.equal(logits(model), logits(adapted(router="static")))


# What is not supported raises


def test_layer_input_of_another_shape_raises():
    model = adapted()
    logits(model)
    layer = next(module for module in model.modules() if isinstance(module, AlterLinear))
    with pytest.raises(ValueError, match=r"input of shape \(35,\) .* \(batch, length\) = \(3, 12\).*exclude_modules"):
        layer(torch.randn(35, layer.in_features))


def test_layer_without_its_decoder_raises():
    layer = next(module for module in adapted().modules() if isinstance(module, AlterLinear))
    with pytest.raises(ValueError, match="without the decoder layer that gates them"):
        layer(torch.randn(2, 3, layer.in_features))


@pytest.mark.parametrize("mode", MODES[:2], ids=["context", "context-base"])
def test_cache_filled_without_the_adapter_raises(mode):
    model, cache = adapted(**mode), DynamicCache()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="`past_key_values` was filled without this adapter"), torch.no_grad():
        model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)


def test_four_dimensional_mask_raises():
    mask = torch.zeros(3, 1, 12, 12)
    with pytest.raises(ValueError, match=r"`attention_mask`, but the decoder was given one of shape \(3, 1, 12, 12\)"):
        logits(adapted(), IDS, mask)
