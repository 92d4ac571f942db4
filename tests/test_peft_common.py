# SPDX-License-Identifier: Apache-2.0
"""What PEFT's PeftCommonTester and test_custom_models check for every method, on an MLP, an encoder, an
encoder-decoder and a decoder with the static router, and on a decoder with the context router."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import TOKENS, adapted, add, base_model, config, generate, inputs, outputs
from torch import nn

from alter_peft.tuner.layer import AlterLinear


STATIC = [("mlp", "static"), ("bert", "static"), ("t5", "static"), ("gpt2", "static")]
CASES = [*STATIC, ("llama", "context")]
every = pytest.mark.parametrize(("family", "router"), CASES, ids=[f"{f}-{r}" for f, r in CASES])
static = pytest.mark.parametrize("family", [family for family, _ in STATIC])
NAMES = ["first", "second"]


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=name)


@every
def test_disabling_and_deepcopy_and_pickle(family, router):
    expected, model = outputs(base_model(family), family), adapted(family, router=router)
    changed = outputs(model, family)
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model, family), expected)
        with model.disable_adapter():  # nested, as PEFT allows
            assert torch.equal(outputs(model, family), expected)
        assert torch.equal(outputs(model, family), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, family), changed)


@every
def test_only_the_adapter_is_trainable_and_trained(family, router):
    model = adapted(family, router=router).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable  # `SEQ_CLS` trains its classifier too
    assert all({"alter_A", "alter_B", "modules_to_save"} & set(name.split(".")) for name in trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        found = model(**inputs(family))
        (found if family == "mlp" else found.logits).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # a gated expert that no token is sent to stays where it is
    assert moved == trainable if router == "static" else moved and moved <= trainable
    counted, total = model.get_nb_trainable_parameters()
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad) < total


@every
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_twice(family, router, low_cpu_mem_usage, tmp_path):
    model = adapted(family, router=router)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ALTER"
    own = config(family, router=router)
    loaded = PeftModel.from_pretrained(
        base_model(family), tmp_path, config=own, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    used = loaded.peft_config["default"]
    assert used is not own and used.inference_mode and (used.r, used.router) == (own.r, own.router)
    for name in NAMES:
        result = loaded.load_adapter(tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.missing_keys and not result.unexpected_keys
        loaded.set_adapter(name)
        assert torch.equal(outputs(loaded, family), outputs(model, family))
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@every
def test_selected_adapters_and_names_within_names(family, router, tmp_path):
    model = adapted(family, router=router)
    expected = adapter_state(model)
    for seed, name in enumerate(["default2", "other_default", "foodefault_bar", "efaul"]):
        add(model, name, family, seed=seed, router=router)
    model.save_pretrained(tmp_path, selected_adapters=["default", "default2"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    assert (tmp_path / "default2").is_dir() and not (tmp_path / "efaul").exists()
    second = load_file(tmp_path / "default2" / "adapter_model.safetensors")
    own = adapter_state(model, "default2")
    assert second.keys() == saved.keys() and all(torch.equal(second[key], own[key]) for key in second)


@pytest.mark.parametrize("name", ["retain", "forget_0"])
def test_adapters_cannot_be_named_as_experts(name):
    with pytest.raises(ValueError, match=f"adapter's name is '{name}', which is the name of an expert"):
        get_peft_model(base_model("mlp"), config("mlp", router="static"), adapter_name=name)
    model = adapted("mlp", router="static")
    with pytest.raises(ValueError, match="Choose another name"):
        model.add_adapter(name, config("mlp", router="static"))
    assert list(model.peft_config) == ["default"] and len(adapter_state(model)) == 4


@static
def test_merging(family, tmp_path):
    model = adapted(family, router="static", expert_weights=[0.5, -1.0])
    add(model, "second", family, router="static", r=4)
    base = outputs(base_model(family), family)
    close = {"atol": 1e-3, "rtol": 1e-3}
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = outputs(model, family)
    for name, safe_merge in (("default", True), ("second", False)):  # one after the other: unmerged by set_adapter
        model.set_adapter(name)
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(outputs(model, family), expected[name], **close)
        with pytest.warns(UserWarning, match="merge is a no-op|already merged"):
            model.merge_adapter()
        torch.testing.assert_close(outputs(model, family), expected[name], **close)
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model, family), expected[name], **close)
    model.merge_adapter(["default"])
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, family), base, **close)
    with pytest.raises(ValueError, match="Adapter 'third' does not exist, only"):
        model.merge_adapter(["third"])
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(outputs(merged, family), expected["default"], **close)
    for name, _ in merged.named_modules():
        assert "alter" not in name and "base_layer" not in name
    if family != "mlp":  # what is merged is saved and loaded like any model
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path).eval()
        assert torch.equal(outputs(loaded, family), outputs(merged, family))


@static
def test_merging_in_half_precision_and_with_nans(family):
    model = adapted(family, router="static").half()
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    layer = next(module for module in model.modules() if isinstance(module, AlterLinear))
    nn.init.constant_(layer.alter_B["default"].forget_0, float("nan"))
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@static
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family, dtype):
    base = base_model(family).to(dtype)
    expected = outputs(base, family)
    model = get_peft_model(base, config(family, router="static")).eval()
    assert {p.dtype for name, p in model.named_parameters() if ".alter_" in name} == {torch.float32}
    found = outputs(model, family)
    assert found.dtype == dtype and found.isfinite().all() and not torch.equal(found, expected)
    halved = outputs(model.to(dtype), family)  # the adapter too
    assert halved.dtype == dtype and halved.isfinite().all()


def test_biases_belong_to_one_adapter():
    model = adapted("mlp", router="static", bias="alter_only")
    assert model.base_model.model.lin0.base_layer.bias.requires_grad
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        add(model, "other", "mlp", router="static", bias="all")
    assert list(model.peft_config) == ["default"]
    with pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias"), model.disable_adapter():
        outputs(model, "mlp")
    assert "alter.AlterLinear(" in repr(model)


def test_static_adapters_merge_beside_a_gated_one():
    model = adapted("llama")
    add(model, "fixed", "llama", router="static")
    gated = outputs(model, "llama")
    model.set_adapter("fixed")
    expected = outputs(model, "llama")
    model.set_adapter("default")
    model.merge_adapter(["fixed"])  # not the active one, which could not be merged
    torch.testing.assert_close(outputs(model, "llama"), expected, atol=1e-3, rtol=1e-3)
    status = model.get_model_status()
    assert status.merged_adapters == ["fixed"] and status.active_adapters == ["default"]
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, "llama"), gated, atol=1e-3, rtol=1e-3)
    model.set_adapter("fixed")
    with pytest.raises(ValueError, match="'default' gates every token by itself"):
        model.merge_and_unload(adapter_names=["default"])
    assert torch.allclose(outputs(model, "llama"), expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"merged\. Please unmerge them first"):
        model.merge_adapter()
        model.delete_adapter("fixed")


@every
def test_unloading(family, router):
    model = adapted(family, router=router)
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded, family), outputs(base_model(family), family))
    assert [n for n, _ in unloaded.named_parameters()] == [n for n, _ in base_model(family).named_parameters()]
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")


def test_generating_with_an_encoder():
    model = adapted("t5", router="static")
    found = generate(model)
    assert found.shape == (3, 7) and torch.equal(found, generate(model, use_cache=False))
    assert not torch.equal(found, generate(base_model("t5")))


@pytest.mark.parametrize("router", ["static", "context"])
def test_meta_weights_on_request(router):
    model = get_peft_model(base_model("llama"), config("llama", router=router), low_cpu_mem_usage=True)
    devices = {p.device.type for name, p in model.named_parameters() if ".alter_" in name}
    assert devices == {"meta"}


@pytest.mark.parametrize("router", ["static", "context"])
def test_trained_tokens(router, tmp_path):
    """`trainable_token_indices`, tied head included."""
    model = adapted("qwen3", router=router, trainable_token_indices=[5, 6])
    plain = adapted("qwen3", router=router)
    assert torch.equal(outputs(model, "qwen3"), outputs(plain, "qwen3"))
    deltas = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert deltas and all(p.requires_grad and p.shape == (2, 32) for p in deltas.values())
    with torch.no_grad():
        for delta in deltas.values():
            delta.add_(1.0)
    changed = outputs(model, "qwen3")
    assert not torch.allclose(changed[..., 5:7], outputs(plain, "qwen3")[..., 5:7], atol=1e-2)  # the tied head
    with model.disable_adapter():
        assert torch.equal(outputs(model, "qwen3"), outputs(base_model("qwen3"), "qwen3"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("qwen3"), tmp_path).eval()
    assert torch.equal(outputs(loaded, "qwen3"), changed)


def test_base_entropy_leaves_trained_tokens_out():
    model = adapted("llama", inference_entropy="base", trainable_token_indices=TOKENS)
    context = next(module.context for module in model.modules() if isinstance(module, AlterLinear))
    outputs(model, "llama")
    expected = context.entropy
    with torch.no_grad():
        model.get_parameter(next(n for n, _ in model.named_parameters() if "tokens_delta" in n)).mul_(3.0)
    changed = outputs(model, "llama")
    assert torch.equal(context.entropy, expected)
    assert torch.equal(outputs(model, "llama"), changed)
    with model.disable_adapter():
        assert not torch.allclose(changed, outputs(model, "llama"), atol=1e-2)


def test_modules_to_save_stay_tied(tmp_path):
    given = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = adapted("qwen3", **given)
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    assert embedding.requires_grad and model.get_output_embeddings().modules_to_save["default"].weight is embedding
    with torch.no_grad():
        embedding.mul_(2.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("qwen3"), tmp_path).eval()
    assert torch.equal(outputs(loaded, "qwen3"), outputs(model, "qwen3"))
    with pytest.raises(ValueError, match=r"`ensure_weight_tying` .*embeddings are no `target_modules`"):
        adapted("qwen3", router="static", target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)
