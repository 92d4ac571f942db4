# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one model: add, set, switch, delete, activate together; their status and what trains."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils import TrainableTokensWrapper
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import load_peft_weights
from tiny_models import adapted, add, base_model, config, generate, outputs
from torch import nn

from alter_peft.tuner.layer import AlterLayer, AlterLinear
from alter_peft.tuner.token_router import AlterRouter


ROUTERS = ["context", "static"]
routers = pytest.mark.parametrize("router", ROUTERS)
# a second adapter that begins deeper, or shallower, than the first
DEPTHS = [(1, 2), (2, 1)]


def layers(model: nn.Module) -> list[AlterLayer | AlterRouter]:
    return [module for module in model.modules() if isinstance(module, (AlterLayer, AlterRouter))]


def trainable(model: nn.Module) -> set[str]:
    """The adapters that have trainable parameters."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {part for name in names for part in name.split(".") if part in ("default", "other", "third")}


@routers
def test_switching(router):
    model = adapted("llama", router=router)
    add(model, "other", "llama", router=router)
    first = outputs(model, "llama")
    assert trainable(model) == {"default"}  # adding one neither activates nor trains it
    model.set_adapter("other")
    second = outputs(model, "llama")
    assert not torch.allclose(first, second, atol=1e-2) and trainable(model) == {"other"}
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(outputs(model, "llama"), first) and not trainable(model)
    assert not any(isinstance(m, AlterRouter) and any(p.requires_grad for p in m.parameters()) for m in layers(model))
    with pytest.raises(ValueError, match="Adapter no not found"):
        model.set_adapter("no")
    with pytest.raises(ValueError, match="Adapter with name 'other' already exists"):
        add(model, "other", "llama", router=router)


@routers
def test_gradients_are_switched_by_name(router):
    model = adapted("llama", router=router)
    add(model, "other", "llama", router=router)
    model.set_requires_grad("other", True)
    assert trainable(model) == {"default", "other"}
    model.set_requires_grad(["default", "other"], False)
    assert not trainable(model)
    model.set_requires_grad(["default"], True)
    frozen = [p for name, p in model.named_parameters() if "alter_router" in name]
    assert trainable(model) == {"default"} and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(("first", "second"), DEPTHS)
def test_active_together(first, second):
    """Updates of one layer that two adapters share add up."""
    model = adapted("llama", router_layer=first, target_modules=["down_proj"], layers_to_transform=[3])
    add(model, "other", "llama", router_layer=second, target_modules=["down_proj"], layers_to_transform=[3])
    base, single = outputs(base_model("llama"), "llama"), []
    hidden: list[torch.Tensor] = []
    layer = model.get_submodule("base_model.model.model.layers.3.mlp.down_proj")
    layer.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        single.append(outputs(model, "llama"))
        assert model.active_adapters == names and trainable(model) == set(names)
    with model.disable_adapter():
        outputs(model, "llama")
    one, two, both, none = hidden
    torch.testing.assert_close(both - none, (one - none) + (two - none), atol=1e-4, rtol=1e-4)
    assert all(not torch.allclose(found, base, atol=1e-2) for found in single)
    assert model.get_model_status().active_adapters == ["default", "other"]


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
@pytest.mark.parametrize("arguments", [*({"router_layer": depth} for depth in (1, 2)), {"router": "static"}])
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("gone", ["default", "other"])
def test_deleting(arguments, active, gone):
    given = {"default": {"router_layer": 2}, "other": arguments}
    model = adapted("llama", **given["default"])
    add(model, "other", "llama", **given["other"])
    model.set_adapter(active)
    model.delete_adapter(gone)
    left = ({"default", "other"} - {gone}).pop()
    assert list(model.peft_config) == [left] and model.active_adapters == [left] == [model.active_adapter]
    assert not any(f".{gone}." in name for name, _ in model.named_parameters())
    for module in layers(model):
        for attribute in (*module.adapter_layer_names, *module.other_param_names):
            assert gone not in getattr(module, attribute)
    model.base_model.set_adapter([left])
    alone = adapted("llama", seed=1 if left == "default" else 2, **given[left])
    assert torch.equal(outputs(model, "llama"), outputs(alone, "llama"))
    assert torch.equal(generate(model, max_new_tokens=2), generate(alone, max_new_tokens=2))
    model.delete_adapter(left)
    assert not model.peft_config and model.active_adapters == []
    assert torch.equal(outputs(model.base_model.model, "llama"), outputs(base_model("llama"), "llama"))


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_deleting_one_of_several_active():
    model = adapted("llama", router_layer=1)
    for name in ("other", "third"):
        add(model, name, "llama", router_layer=2)
    model.base_model.set_adapter(["default", "third"])
    model.delete_adapter("default")
    assert model.active_adapters == ["third"] and model.get_model_status().available_adapters == ["other", "third"]
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")


@routers
def test_status(router):
    model = adapted("llama", router=router)
    add(model, "other", "llama", router=router)
    status = model.get_model_status()
    assert status.peft_types == {"default": "ALTER", "other": "ALTER"} and status.adapter_model_type == "AlterModel"
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]} and status.quantization_backend is None
    assert status.num_adapter_layers == len(layers(model)) == len(model.get_layer_status())
    assert {layer.module_type for layer in model.get_layer_status()} >= {"alter.AlterLinear"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@routers
def test_inference_mode_of_the_config(router):
    model = get_peft_model(base_model("llama"), config("llama", router=router, inference_mode=True))
    assert not trainable(model)
    add(model, "other", "llama", router=router)
    model.set_adapter("other")
    assert trainable(model) == {"other"}


def test_modules_to_save_follow_their_adapter(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    add(model, "other", "llama", modules_to_save=["lm_head"])
    add(model, "third", "llama", seed=3)
    heads = model.base_model.model.lm_head.modules_to_save
    with torch.no_grad():
        heads["default"].weight.mul_(2.0)
        heads["other"].weight.mul_(-1.0)
    expected = {}
    for name in ("default", "other", "third"):
        model.set_adapter(name)
        expected[name] = outputs(model, "llama")
        assert trainable(model) == {name}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    for name in ("other", "third"):
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    for name, found in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(outputs(loaded.eval(), "llama"), found)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(outputs(model, "llama"), expected["other"])


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_trained_tokens_are_deleted_with_their_adapter():
    model = adapted("llama", trainable_token_indices=[5, 6])
    add(model, "other", "llama", trainable_token_indices=[7])
    model.set_adapter("other")
    expected = outputs(model, "llama")
    model.delete_adapter("default")
    wrappers = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    assert wrappers and all(list(wrapper.token_adapter.trainable_tokens_delta) == ["other"] for wrapper in wrappers)
    assert torch.equal(outputs(model, "llama"), expected)
    model.delete_adapter("other")
    assert torch.equal(outputs(model.base_model.model, "llama"), outputs(base_model("llama"), "llama"))


@routers
def test_ranks_that_differ_by_layer_and_by_adapter(router):
    model = adapted("llama", router=router, rank_pattern={"q_proj": 2, r"3\.mlp\.up_proj": 5})
    first = outputs(model, "llama")
    add(model, "other", "llama", router=router, r=3, rank_pattern={"v_proj": 7}, alpha_pattern={"v_proj": 14})
    layer = model.get_submodule("base_model.model.model.layers.3")
    ranks = [module.r for module in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj)]
    assert ranks == [{"default": 2, "other": 3}, {"default": 8, "other": 7}, {"default": 5, "other": 3}]
    assert layer.self_attn.v_proj.scaling == {"default": 2.0, "other": 2.0}
    assert torch.equal(outputs(model, "llama"), first)
    model.set_adapter("other")
    assert not torch.allclose(outputs(model, "llama"), first, atol=1e-2)


def test_rescaling_by_peft_is_refused_and_experts_can_be_scaled_instead():
    model = adapted("llama")
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        rescale_adapter_scale(model, 0.5).__enter__()
    before = outputs(model, "llama")
    with model.experts(forget_0=0.5):
        assert not torch.equal(outputs(model, "llama"), before)


def test_hot_swapping_is_refused_and_weights_can_be_set_instead(tmp_path):
    """PEFT swaps LoRA alone; `set_peft_model_state_dict` exchanges the weights of two adapters of one shape."""
    model, other = adapted("llama"), adapted("llama", seed=2)
    other.save_pretrained(tmp_path)
    before = outputs(model, "llama")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but ALTER was passed"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(outputs(model, "llama"), before)
    parameters = dict(model.named_parameters())
    result = set_peft_model_state_dict(model, load_peft_weights(tmp_path, device="cpu"))
    assert not result.unexpected_keys and torch.equal(outputs(model, "llama"), outputs(other, "llama"))
    assert all(parameters[name] is p for name, p in model.named_parameters())  # in place, for compiled models
    with pytest.raises(ValueError, match=r"does not fit this base model: .* has shape"):
        set_peft_model_state_dict(adapted("llama", r=4), load_peft_weights(tmp_path, device="cpu"))


def test_weighted_sums_are_refused():
    model = adapted("llama")
    with pytest.raises(NotImplementedError, match=r"no `add_weighted_adapter`: .*set_adapter\(\[\.\.\.\]\)"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@routers
def test_mixing_peft_types_is_refused(router):
    with pytest.raises(ValueError, match="'ALTER' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base_model("mlp"), config("mlp", router=router), mixed=True)


@routers
def test_dtype_and_device_moves(router):
    model = adapted("llama", router=router)
    state = get_peft_model_state_dict(model)
    twin = adapted("llama", router=router).to(torch.bfloat16)
    for name, value in get_peft_model_state_dict(twin).items():
        assert value.dtype == (torch.float32 if "alter_router" in name else torch.bfloat16)
        torch.testing.assert_close(value.float(), state[name], atol=1e-2, rtol=1e-2)
    found, expected = outputs(twin, "llama"), outputs(base_model("llama").to(torch.bfloat16), "llama")
    assert found.dtype == torch.bfloat16 and not torch.equal(found, expected)
    with twin.disable_adapter():
        assert torch.equal(outputs(twin, "llama"), expected)
    meta = adapted("llama", router=router).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert any(isinstance(module, AlterLinear) for module in meta.modules())
