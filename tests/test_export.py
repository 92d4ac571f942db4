# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from test_tuner import IDS, MASK, MODES, adapted, base_model, config, logits
from torch import nn

from alter_peft.tuner.export import export_to_lora
from alter_peft.tuner.layer import AlterLinear


PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 5}, "alpha_pattern": {"v_proj": 1}}
OMEGA = {"router": "static", "expert_weights": [0.5, -1.0]}


def layers_of(model: nn.Module) -> list[AlterLinear]:
    return [module for module in model.modules() if isinstance(module, AlterLinear)]


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.clone() for layer in layers_of(model)]


# Merging


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("llama", {}),
        ("llama", {**PATTERNS, "use_rslora": True}),
        ("llama", {"fan_in_fan_out": True}),
        ("gpt2", {}),
        ("gpt2", {"fan_in_fan_out": True, "bias": "alter_only"}),
        ("llama", {"domains": ["a", "b"], "expert_scales": {"a": 0.0}}),
    ],
    ids=["llama", "patterns", "fan_in_fan_out", "conv1d", "conv1d-fan_in_fan_out-bias", "scaled"],
)
def test_merging_is_exact(family, arguments):
    model = adapted(family, **OMEGA, **arguments).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter)
    expected, before = logits(model), weights_of(model)
    model.merge_adapter()
    changed = [not torch.allclose(a, b) for a, b in zip(weights_of(model), before, strict=True)]
    assert changed and all(changed)
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    for a, b in zip(weights_of(model), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, atol=1e-10, rtol=1e-10)
    assert not any("alter" in name for name, _ in merged.named_parameters())
    assert not torch.allclose(logits(model.unload()), expected)


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # where one adapter has no layer, as with LoRA
def test_several_adapters_merge_together_and_one_by_one():
    model = adapted(**OMEGA).double()
    torch.manual_seed(2)
    model.add_adapter("second", config(router="static", num_forget_experts=3, target_modules=["q_proj"], r=3))
    model.double()
    first, before = logits(model), weights_of(model)
    model.base_model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(first, both) and not torch.allclose(second, both)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    for a, b in zip(weights_of(model), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)
    for name, expected in ("default", first), ("second", second):
        model.base_model.set_adapter(name)  # a layer without the merged adapter goes on with the active ones
        model.merge_adapter(adapter_names=[name])
        torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
        model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged), both, atol=1e-10, rtol=1e-10)


def test_a_static_adapter_merges_beside_a_gated_one():
    model = adapted(**OMEGA).double()
    expected, before = logits(model), weights_of(model)
    model.add_adapter("gated", config())
    with pytest.raises(ValueError, match="'gated' gates every token by itself"):
        model.merge_and_unload(adapter_names=["default", "gated"])
    assert all(map(torch.equal, weights_of(model), before))
    model.merge_adapter(adapter_names=["default"])
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-10, rtol=1e-10)
    assert not any("router" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("mode", MODES, ids=["context", "context-base", "entropy"])
def test_refusing_to_merge_names_both_ways_out(mode):
    model = adapted(**mode)
    ways = r"gates every token by itself.*AlterConfig\(router='static'\).*fixed `expert_weights` with.*export_to_lora"
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: layers_of(model)[0].merge()):
        with pytest.raises(ValueError, match=ways):
            merge()
    assert not any(layer.merged for layer in layers_of(model))


# Export to LoRA


LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = sys.argv[1]
given = torch.load(folder + "/given.pt")
for name, family, expected in given["cases"]:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}")
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    assert type(model.base_model).__name__ == "LoraModel"
    for merged in (False, True):
        if merged:
            model = model.merge_and_unload()
        with torch.no_grad():
            found = model(input_ids=given["ids"], attention_mask=given["mask"]).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")
assert not any(name.startswith("alter_peft") for name in sys.modules)
print("equal")
"""
CASES = {
    "plain": ("llama", {}),
    "patterns": ("llama", {**PATTERNS, "use_rslora": True}),
    "layers": ("llama", {"layers_to_transform": [1, 3], "target_modules": ["q_proj", "down_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.[12]\..*(q|v)_proj"}),
    "excluded": ("llama", {"exclude_modules": ["k_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {}),
    "bias": ("gpt2", {"bias": "alter_only"}),
    "all-biases": ("gpt2", {"bias": "all"}),
    "scaled": ("llama", {"expert_scales": {"forget_1": 0.25}}),
}


def test_stock_peft_loads_the_export_without_this_package(tmp_path):
    cases = []
    for name, (family, arguments) in CASES.items():
        model = adapted(family, **OMEGA, **arguments)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and ".alter_" not in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = logits(model)
        assert not torch.allclose(expected, logits(base_model(family)), atol=1e-2)
        export_to_lora(model, tmp_path / name)
        assert torch.equal(logits(model), expected)  # the export changes nothing
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        cases.append((name, family, expected))
    for family in ("llama", "gpt2"):
        base_model(family).save_pretrained(tmp_path / family)
    torch.save({"ids": IDS, "mask": MASK, "cases": cases}, tmp_path / "given.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LOAD, str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


def test_the_export_is_lora_of_the_same_rank(tmp_path):
    model = adapted(**OMEGA, **PATTERNS, lora_alpha=4)
    export_to_lora(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    lora = LoraConfig.from_pretrained(tmp_path)
    assert (lora.r, lora.lora_alpha, lora.rank_pattern, lora.alpha_pattern) == (8, 4, *PATTERNS.values())
    assert lora.target_modules == model.peft_config["default"].target_modules
    assert lora.task_type == "CAUSAL_LM" and lora.inference_mode and lora.bias == "none"
    assert len(saved) == 2 * len(layers_of(model))
    for name, module in model.named_modules():
        if isinstance(module, AlterLinear):
            retain, first, second = module.alter_B["default"].experts()
            assert torch.equal(saved[f"{name}.lora_A.weight"], module.alter_A["default"].weight)
            torch.testing.assert_close(saved[f"{name}.lora_B.weight"], retain + 0.5 * first - second)


@pytest.mark.parametrize("arguments", [{}, {"target_modules": r".*\.q_proj"}], ids=["names", "regex"])
def test_a_gated_adapter_is_folded_at_given_weights_alone(tmp_path, arguments):
    model = adapted(**arguments)
    with pytest.raises(ValueError, match=r"'default' gates every token by itself .*export_to_lora"):
        export_to_lora(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    export_to_lora(model, tmp_path / "fold", expert_weights=[0.5, -1.0])
    folded = PeftModel.from_pretrained(base_model(), tmp_path / "fold").eval()
    adapted_layers = {name for name, module in model.named_modules() if isinstance(module, AlterLinear)}
    assert adapted_layers == {
        name for name, module in folded.named_modules() if "lora_A" in dict(module.named_children())
    }
    # the same experts under a static router are what the fold is
    static = adapted(
        **OMEGA, **({"layers_to_transform": [2, 3]} if not arguments else {"target_modules": r".*\.[23]\..*q_proj"})
    )
    for ours, theirs in zip(layers_of(static), layers_of(model), strict=True):
        ours.alter_A.load_state_dict(theirs.alter_A.state_dict())
        ours.alter_B.load_state_dict(theirs.alter_B.state_dict())
    torch.testing.assert_close(logits(folded), logits(static), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(folded), logits(model), atol=1e-2)


def test_an_expert_that_is_off_stays_off(tmp_path):
    model = adapted(domains=["a", "b"])
    model.set_expert_scale("a", 0)
    export_to_lora(model, tmp_path / "off", expert_weights=[1.0, 1.0])
    export_to_lora(adapted(domains=["a", "b"]), tmp_path / "none", expert_weights=[0.0, 1.0])
    off, none = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("off", "none"))
    assert off.keys() == none.keys() and all(torch.equal(off[key], none[key]) for key in off)


def test_one_of_several_adapters_is_exported(tmp_path):
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("second", config(**OMEGA, target_modules=["q_proj"], r=3))
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("default")
    export_to_lora(model, tmp_path, adapter_name="second")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert loaded.peft_config["default"].r == 3


def test_an_export_replaces_whole_files_alone(tmp_path, monkeypatch):
    model = adapted(**OMEGA)
    export_to_lora(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.set_expert_scale("forget_0", 0)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        export_to_lora(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_name": "other"}, r"`adapter_name` is 'other', but must be one of \['default'\]"),
        ({"expert_weights": [1.0]}, r"`expert_weights` is \[1.0\], but must be one finite number for each of"),
        ({"expert_weights": [1.0, float("nan")]}, r"`expert_weights` is \[1.0, nan\]"),
    ],
)
def test_unusable_arguments_raise(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_to_lora(adapted(**OMEGA), tmp_path / "no", **arguments)
    assert not (tmp_path / "no").exists()


def test_another_kind_of_adapter_raises(tmp_path):
    model = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is a LoraConfig, but must be an ALTER adapter"):
        export_to_lora(model, tmp_path)


# PEFT's own conversion


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_converts_a_static_adapter_up_to_rounding(family):
    model = adapted(family, **OMEGA, **({"layers_to_transform": [1, 2]} if family == "llama" else {}))
    assert model.supports_lora_conversion()
    lora, state = convert_to_lora(model, rank=8)
    for name, module in model.named_modules():
        if isinstance(module, AlterLinear):
            delta = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            expected = module.get_delta_weight("default")
            expected = expected if family == "llama" else expected.T
            assert (delta - expected).norm() < 1e-5 * expected.norm()
    assert lora.r == lora.lora_alpha == 8


def test_peft_does_not_convert_a_gated_adapter():
    model = adapted()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=8)
