# SPDX-License-Identifier: Apache-2.0
"""What PEFT's test_low_level_api, test_config and test_initialization check for every method."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import fields

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import MLP, adapted, base_model, config, inputs, outputs
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import MambaConfig, MambaForCausalLM

from alter_peft import AlterConfig
from alter_peft.tuner.layer import AlterLayer
from alter_peft.tuner.token_router import AlterRouter


CASES = [("mlp", "static"), ("bert", "static"), ("t5", "static"), ("llama", "context")]
every = pytest.mark.parametrize(("family", "router"), CASES, ids=[f"{f}-{r}" for f, r in CASES])


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AlterLayer)]


def injected(family: str, seed: int = 1, state_dict=None, **arguments) -> nn.Module:
    model = base_model(family)
    torch.manual_seed(seed)
    return inject_adapter_in_model(config(family, **arguments), model, state_dict=state_dict).eval()


# Injection without a PeftModel


@every
def test_state_dicts_of_an_injected_adapter(family, router):
    model, other = injected(family, router=router), injected(family, seed=2, router=router)
    assert torch.equal(outputs(model, family), outputs(adapted(family, router=router), family))
    state = get_peft_model_state_dict(model)
    names = [key for key in state if "modules_to_save" not in key and ".alter_" in f".{key}"]
    assert names and all(key.startswith(tuple(adapted_names(model))) or "alter_router" in key for key in names)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys and torch.equal(outputs(other, family), outputs(model, family))


@every
def test_injection_by_a_state_dict(family, router, recwarn):
    state = get_peft_model_state_dict(injected(family, router=router))
    model = injected(family, router=router, state_dict=state)
    assert not [w for w in recwarn if issubclass(w.category, (RuntimeWarning, UserWarning))]
    found = get_peft_model_state_dict(model)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in state.items()}
    fewer = {key: value for key, value in state.items() if not key.startswith(adapted_names(model)[0] + ".")}
    if fewer:
        with pytest.warns(RuntimeWarning, match="PEFT config contained these additional target modules"):
            injected(family, router=router, state_dict=fewer)
    less = {"target_modules": ["q_proj"]} if family == "llama" else {"exclude_modules": adapted_names(model)[:1]}
    if len(adapted_names(model)) > 1:
        with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
            more = injected(family, router=router, state_dict=state, **less)
        assert adapted_names(more) == adapted_names(model)
    meta = inject_adapter_in_model(
        config(family, router=router), base_model(family), state_dict=state, low_cpu_mem_usage=True
    )
    devices = {value.device.type for key, value in get_peft_model_state_dict(meta).items() if "alter_" in key}
    assert devices == {"meta"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_second_adapter_is_injected_by_a_state_dict():
    model = injected("llama", router_layer=1)
    state = get_peft_model_state_dict(model)
    inject_adapter_in_model(config("llama", router_layer=1), model, adapter_name="other", state_dict=state)
    other = get_peft_model_state_dict(model, adapter_name="other")
    assert other.keys() == state.keys() and sum(isinstance(m, AlterRouter) for m in model.modules()) == 1


def test_a_state_dict_below_the_router_is_refused():
    state = get_peft_model_state_dict(injected("llama", router_layer=2, layers_to_transform=[2, 3]))
    state = {key.replace("layers.2.", "layers.0.") if "_proj" in key else key: value for key, value in state.items()}
    model = base_model("llama")
    with pytest.raises(ValueError, match=r"`state_dict` has an adapter on 'model\.layers\.0\..*Set `router_layer`"):
        inject_adapter_in_model(config("llama", router_layer=2), model, state_dict=state)
    assert not adapted_names(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"router_layer": 2}, r"a router on 'model\.layers\.2\.token_router', but `router_layer` is 1\. Set"),
        (
            {"layers_to_transform": [1, 2]},
            r"an adapter on 'model\.layers\.1\..* `layers_to_transform` is \[2, 3\]\. Set",
        ),
    ],
)
def test_a_state_dict_of_other_layers_is_refused(given, message):
    """Else its router would be left out, or layers adapted that the config doesn't name."""
    state = get_peft_model_state_dict(injected("llama", **given))
    model = base_model("llama")
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(config("llama"), model, state_dict=state)
    assert not adapted_names(model)


def test_state_dict_of_the_base_alone():
    model = adapted("llama", modules_to_save=["lm_head"])
    expected = base_model("llama").state_dict()
    state = get_base_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    set_base_model_state_dict(model, {key: torch.zeros_like(value) for key, value in state.items()})
    with model.disable_adapter():
        assert not outputs(model, "llama").any()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_transformers_own_methods(tmp_path):
    """`add_adapter`, `load_adapter`, `set_adapter`, `disable_adapters`, `enable_adapters`, `delete_adapter`."""
    model = base_model("llama")
    for seed, (name, depth) in enumerate({"first": 2, "second": 1}.items()):
        torch.manual_seed(seed)
        model.add_adapter(config("llama", router_layer=depth), adapter_name=name)
    second = outputs(model.eval(), "llama")
    assert model.active_adapters() == ["second"]
    model.set_adapter("first")
    first = outputs(model, "llama")
    torch.manual_seed(0)
    alone = get_peft_model(base_model("llama"), config("llama", router_layer=2)).eval()
    assert torch.equal(first, outputs(alone, "llama")) and not torch.equal(first, second)
    model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["first", "second"] and not torch.equal(outputs(model, "llama"), second)
    model.disable_adapters()
    assert torch.equal(outputs(model, "llama"), outputs(base_model("llama"), "llama"))
    model.enable_adapters()
    model.set_adapter("first")
    model.save_pretrained(tmp_path)
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"] and not any(".first." in n for n, _ in model.named_parameters())
    model.set_adapter("second")
    assert torch.equal(outputs(model, "llama"), second)
    model.load_adapter(str(tmp_path), adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(outputs(model, "llama"), first)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path).eval()  # PEFT reads what transformers wrote
    assert torch.equal(outputs(loaded, "llama"), first)


# Configuration


def test_configs_are_saved_loaded_and_copied(tmp_path):
    own = AlterConfig(
        r=4, target_modules=["v", "q"], exclude_modules=["k"], domains=["a", "b"], rank_pattern={"q": 2},
        trainable_token_indices={"embed_tokens": [1, 2]}, ensure_weight_tying=True, revision="x",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    own.save_pretrained(tmp_path)
    for loaded in (AlterConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded.to_dict() == own.to_dict() and type(loaded) is AlterConfig
        assert loaded.target_modules == {"q", "v"} and loaded.exclude_modules == {"k"}
    assert get_peft_config(own.to_dict()).to_dict() == own.to_dict()
    assert copy.deepcopy(own).to_dict() == pickle.loads(pickle.dumps(own)).to_dict() == own.to_dict()
    file = tmp_path / "adapter_config.json"
    assert sorted(json.loads(file.read_text())["target_modules"]) == ["q", "v"]  # a list, in PEFT's order: any
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\] for class AlterConfig"):
        assert AlterConfig.from_pretrained(tmp_path).to_dict() == own.to_dict()
    with pytest.raises(TypeError, match="unexpected keyword argument 'from_the_future'"):
        AlterConfig(from_the_future=1)


def test_config_of_the_base_is_left_alone():
    before = base_model("llama").config.to_dict()
    assert adapted("llama").config.to_dict() == before


@pytest.mark.parametrize("router", ["static", "context"])
def test_what_matches_no_module(router):
    with pytest.raises(ValueError, match=r"Target modules \{'no'\} not found in the base model"):
        adapted("llama", router=router, target_modules=["no"])
    with pytest.raises(ValueError, match=r"All modules were excluded|No modules were targeted"):
        adapted("llama", router=router, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(MLP(), AlterConfig(router="static"))
    with pytest.warns(UserWarning, match=r"exclude_modules=\{'no'\} but no modules were excluded"):
        adapted("llama", router=router, exclude_modules=["no"])
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*\['no'\]"):
        adapted("llama", router=router, rank_pattern={"no": 2})
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern keys did not match .*\['no'\]"):
        adapted("llama", router=router, alpha_pattern={"no": 2})


LORA_ALONE = {
    "use_dora": True, "init_lora_weights": "pissa", "loftq_config": {}, "eva_config": None, "lora_bias": True,
    "target_parameters": ["w"], "layer_replication": [(0, 1)], "megatron_config": {}, "alora_invocation_tokens": [1],
    "arrow_config": None,
}  # fmt: skip


@pytest.mark.parametrize("option", LORA_ALONE)
def test_options_of_lora_alone_are_no_options_here(option):
    assert option in {field.name for field in fields(LoraConfig)}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        AlterConfig(**{option: LORA_ALONE[option]})


class Attention(nn.Module):
    """Reads `out_proj.weight` without calling `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize("router", ["static", "context"])
def test_layers_that_are_not_called_are_refused(router):
    """Mamba's: on a CPU or in the kernels of a GPU."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    named = {"router": router, "target_modules": ["in_proj", "dt_proj", "out_proj", "x_proj"]}
    names = ["mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"]
    with pytest.raises(ValueError, match=rf"{', '.join(names)} \(read without calling .*`exclude_modules=\['mixer"):
        get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), AlterConfig(**named))
    with pytest.raises(ValueError, match=r"mixer.dt_proj \(read without calling"):
        get_peft_model(
            MambaForCausalLM(MambaConfig(**sizes)), AlterConfig(router=router, target_modules=["in_proj", "dt_proj"])
        )
    for suited in (
        AlterConfig(**named, exclude_modules=names),
        AlterConfig(router=router, target_modules="all-linear"),
    ):
        rest = get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), suited)
        assert {name.rpartition(".")[2] for name in adapted_names(rest)} == {"in_proj"}
    if router == "static":
        with pytest.raises(ValueError, match="MultiheadAttention reads its weight without calling it"):
            get_peft_model(Attention(), AlterConfig(router=router, target_modules=["out_proj"]))


@pytest.mark.parametrize(("family", "router"), [("llama", "context"), ("gpt2", "context"), ("t5", "static")])
def test_training_on_a_base_prepared_for_few_bits(family, router):
    """`prepare_model_for_kbit_training`, with input gradients for checkpointing, as PEFT has it for QLoRA."""
    prepared = prepare_model_for_kbit_training(base_model(family), use_gradient_checkpointing=False)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    model = get_peft_model(prepared, config(family, router=router))
    model.enable_input_require_grads()
    ids = torch.tensor([[5, 6, 7]])
    assert model.get_input_embeddings()(ids).requires_grad
    model(**inputs(family)).logits.square().mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached and all(".alter_A." in name or ".alter_B." in name for name in reached)


@every
def test_missing_keys_are_reported(family, router, tmp_path):
    model = adapted(family, router=router)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    missing = {key for key in state if key.endswith(".retain") or "router.weight" in key}
    save_file({key: value for key, value in state.items() if key not in missing}, file)
    model.peft_config["default"].save_pretrained(tmp_path)  # with their checksum
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint") as caught:
        loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    message = next(str(w.message) for w in caught if "missing adapter keys" in str(w.message))
    assert all(key.rpartition(".")[0] in message for key in missing)
    assert loaded.peft_config["default"].inference_mode


@every
def test_a_device_map_places_what_is_loaded(family, router, tmp_path):
    model = adapted(family, router=router)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(outputs(loaded, family), outputs(model, family))


@pytest.mark.parametrize("router", ["static", "context"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("layers", [2, [2], [1, 2]])
def test_layers_to_transform_whatever_the_size_of_the_model(family, router, layers):
    """Also when "all-linear" stands for fewer than the 20 layers from which PEFT abbreviates their names."""
    first = {} if router == "static" else {"router_layer": 1}
    names = adapted_names(adapted(family, router=router, layers_to_transform=layers, **first))
    found = {int(re.search(r"\.(\d+)\.", name)[1]) for name in names}
    assert found == ({layers} if isinstance(layers, int) else set(layers))
    excluded = adapted(
        family, router=router, layers_to_transform=layers, exclude_modules=r".*\.(attn|self_attn)\..*", **first
    )
    assert 0 < len(adapted_names(excluded)) < len(names)
    assert not any("attn" in name.rsplit(".", 2)[1] for name in adapted_names(excluded))


# Weights as FSDP 1 wraps them


@pytest.fixture
def one_process():
    """A process group of one, as PEFT's own tests of FSDP make it."""
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # FSDP 1 is deprecated, and wants a GPU
@pytest.mark.parametrize(("family", "router"), [("llama", "context"), ("gpt2", "context"), ("llama", "static")])
def test_weights_in_fsdp_1_are_read_saved_and_loaded(family, router, one_process):
    """In their forward, the experts are no Parameters then but views of FSDP's own."""
    model = adapted(family, router=router)
    expected = outputs(model, family)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(outputs(model, family), expected)
    state = get_peft_model_state_dict(model)
    assert not [key for key in state if "_fsdp_wrapped_module" in key]
    loaded = adapted(family, seed=2, router=router)
    set_peft_model_state_dict(loaded, state)
    torch.testing.assert_close(outputs(loaded, family), expected)


def test_one_config_loads_two_adapters(tmp_path):
    """PEFT keeps the very object in both, so that what is done to an expert of one would be in the other's config."""
    adapted("llama").save_pretrained(tmp_path)
    own = PeftConfig.from_pretrained(tmp_path)
    first, second = (PeftModel.from_pretrained(base_model("llama"), tmp_path, config=own) for _ in range(2))
    first.base_model.delete_expert("forget_0")
    first.base_model.set_expert_scale("forget_1", 0.0)
    assert first.peft_config["default"].num_forget_experts == 1
    for kept in (own, second.peft_config["default"]):
        assert kept.num_forget_experts == 2 and kept.expert_scales is None
    second.save_pretrained(tmp_path / "again")
    assert PeftConfig.from_pretrained(tmp_path / "again").num_forget_experts == 2
