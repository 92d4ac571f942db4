# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from alter_peft import AlterConfig
from alter_peft.entropy import max_tsallis_entropy
from alter_peft.registration import ALTER
from alter_peft.tuner.layer import AlterLinear
from alter_peft.tuner.router import ROUTERS


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval()


def tiny_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AlterLinear)]


def test_constructible_without_arguments():
    config = AlterConfig()
    assert config.peft_type is ALTER and config.is_gated
    assert (config.r, config.lora_alpha, config.top_k, config.bias) == (8, 16, 3, "none")
    assert (config.entropy_q, config.entropy_threshold, config.entropy_quantile) == (1.5, 1.2, None)
    assert (config.temperature_high, config.temperature_low, config.router_half_life) == (0.8, 0.01, 16.0)
    assert (config.router, config.router_layer, config.inference_entropy) == ("context", None, "none")
    assert (config.num_forget_experts, config.domains, config.expert_weights) == (None, None, None)
    assert config.init_weights is True


def test_defaults_that_follow_other_fields():
    assert AlterConfig(domains=["a", "b", "c"]).num_forget_experts == 3
    assert AlterConfig(router="static", expert_weights=[1.0, -1.0]).num_forget_experts == 2
    assert AlterConfig(router="entropy").inference_entropy == "base"
    assert AlterConfig(entropy_quantile=0.5).entropy_threshold is None
    assert AlterConfig(entropy_quantile=0.5, entropy_threshold=0.7).entropy_threshold == 0.7
    assert AlterConfig(target_modules=["a", "a"]).target_modules == {"a"}
    assert AlterConfig(exclude_modules=["a"]).exclude_modules == {"a"}


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("r", {"r": 0}),
        ("r", {"r": 2.5}),
        ("r", {"r": True}),
        ("lora_alpha", {"lora_alpha": 0}),
        ("lora_alpha", {"lora_alpha": float("nan")}),
        ("lora_alpha", {"lora_alpha": float("inf")}),
        ("lora_alpha", {"lora_alpha": "16"}),
        ("temperature_low", {"temperature_low": float("inf")}),
        ("domains", {"domains": "person"}),
        ("domains", {"domains": [1, 2]}),
        ("expert_weights", {"router": "static", "expert_weights": [float("nan")]}),
        ("expert_weights", {"router": "static", "expert_weights": "12"}),
        ("inference_entropy", {"router": "static", "inference_entropy": "base"}),
        ("lora_dropout", {"lora_dropout": 1.0}),
        ("lora_dropout", {"lora_dropout": -0.1}),
        ("rank_pattern", {"rank_pattern": {"q_proj": 0}}),
        ("alpha_pattern", {"alpha_pattern": {"q_proj": -1}}),
        ("rank_pattern", {"rank_pattern": [4]}),
        ("rank_pattern", {"rank_pattern": None}),
        ("alpha_pattern", {"alpha_pattern": "q_proj"}),
        ("alpha_pattern", {"alpha_pattern": {0: 8}}),
        ("use_rslora", {"use_rslora": "no"}),
        ("fan_in_fan_out", {"fan_in_fan_out": 1}),
        ("ensure_weight_tying", {"ensure_weight_tying": "yes"}),
        ("init_weights", {"init_weights": 1}),
        ("init_weights", {"init_weights": None}),
        ("layers_to_transform", {"layers_to_transform": "3"}),
        ("layers_to_transform", {"layers_to_transform": True}),
        ("layers_to_transform", {"layers_to_transform": []}),
        ("layers_to_transform", {"layers_to_transform": [2, "3"]}),
        ("layers_to_transform", {"layers_to_transform": [-1]}),
        ("bias", {"bias": "lora_only"}),
        ("entropy_q", {"entropy_q": 0.0}),
        ("entropy_q", {"entropy_q": float("inf")}),
        ("entropy_threshold", {"entropy_threshold": -0.1}),
        ("entropy_threshold", {"entropy_threshold": float("nan")}),
        ("entropy_quantile", {"entropy_quantile": 0.0}),
        ("entropy_quantile", {"entropy_quantile": 1.0}),
        ("temperature_high", {"temperature_high": 0.0}),
        ("temperature_low", {"temperature_low": -1.0}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 1.5}),
        ("router_half_life", {"router_half_life": 0}),
        ("init_weights", {"init_weights": "gaussian"}),
        ("num_forget_experts", {"num_forget_experts": 0}),
        ("num_forget_experts", {"num_forget_experts": 1.0}),
        ("num_forget_experts", {"domains": []}),
        ("router", {"router": "mlp"}),
        ("inference_entropy", {"inference_entropy": "previous"}),
        ("inference_entropy", {"router": "entropy", "inference_entropy": "none"}),
        ("domains", {"domains": ["a", "a"]}),
        ("domains", {"domains": ["a", "b"], "num_forget_experts": 3}),
        ("expert_weights", {"expert_weights": [1.0]}),
        ("expert_weights", {"router": "static", "expert_weights": [1.0], "num_forget_experts": 2}),
        ("layers_pattern", {"layers_pattern": "layers"}),
        ("layers_to_transform", {"router": "static", "target_modules": ".*q_proj", "layers_to_transform": [1]}),
        ("router_layer", {"router_layer": -1}),
        ("router_layer", {"router_layer": 1.0}),
        ("router_layer", {"router": "static", "router_layer": 1}),
    ],
)
def test_bad_value_names_the_field(field, arguments):
    with pytest.raises(ValueError, match=rf"^`{field}[^`]*` is .*, but must be "):
        AlterConfig(**arguments)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_threshold_above_the_maximum_of_the_vocabulary(llama, q):
    highest = max_tsallis_entropy(llama.config.vocab_size, q)
    with pytest.raises(ValueError, match=r"`entropy_threshold` is .* cannot exceed .* Lower"):
        get_peft_model(llama, AlterConfig(entropy_q=q, entropy_threshold=highest + 1e-6))
    get_peft_model(llama, AlterConfig(entropy_q=q, entropy_threshold=highest - 1e-3))


def test_help_lists_every_field_and_every_router():
    own, words = inspect.get_annotations(AlterConfig), " ".join(AlterConfig.__doc__.split())
    for field in fields(AlterConfig):
        if field.name in own:
            assert field.name + " (`" in words and field.metadata["help"] in words, field.name
    assert all(f'"{name}" {router.caption}' in words for name, router in ROUTERS.items())


@pytest.mark.parametrize(
    ("depth", "layers", "reads"),
    [(4, None, 1), (1, None, 0), (4, [0, 2], 0), (4, 0, 0), (4, [1], 1), (4, [3], 1)],
)
def test_the_router_reads_below_all_that_is_adapted(depth, layers, reads):
    """By default what enters layer 1, or less where that is adapted or isn't there."""
    model = get_peft_model(make_llama(64, num_hidden_layers=depth), AlterConfig(layers_to_transform=layers))
    assert model.peft_config["default"].router_layer == reads
    assert hasattr(model.get_submodule(f"base_model.model.model.layers.{reads}"), "token_router")


def test_router_layer_out_of_range(llama):
    with pytest.raises(ValueError, match="`router_layer` is 4, but the model has 4 layers"):
        get_peft_model(llama, AlterConfig(router_layer=4))


@pytest.mark.parametrize("layers", [[1, 3], 1])
def test_layers_below_the_router(llama, layers):
    with pytest.raises(ValueError, match=r"`layers_to_transform` contains \[1\], .* `router_layer`=2\. Remove"):
        get_peft_model(llama, AlterConfig(router_layer=2, layers_to_transform=layers))


@pytest.mark.parametrize("arguments", [{}, {"router_layer": 2}])
def test_layers_that_the_model_does_not_have(llama, arguments):
    with pytest.raises(
        ValueError, match=r"`layers_to_transform` contains \[4, 9\], but the model has 4 layers\. Remove"
    ):
        get_peft_model(llama, AlterConfig(layers_to_transform=[3, 4, 9], **arguments))


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({}, {2, 3}),  # round(0.4 * 4) = 2
        ({"router_layer": 1}, {2, 3}),  # the default, written out
        ({"router_layer": 0, "layers_to_transform": [0, 1, 2, 3]}, {0, 1, 2, 3}),
        ({"router_layer": 3}, {3}),
        ({"router_layer": 1, "layers_to_transform": [1, 3]}, {1, 3}),
        ({"router_layer": 1, "layers_to_transform": 2}, {2}),
        ({"router": "static"}, {0, 1, 2, 3}),
        ({"target_modules": r".*\.q_proj"}, {2, 3}),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": [3]}, {3}),
    ],
)
def test_adapted_layers(llama, arguments, layers):
    model = get_peft_model(llama, AlterConfig(**arguments))
    names = adapted(model)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == layers
    assert not any("lm_head" in name for name in names)
    kinds = 1 if "target_modules" in arguments else 7
    assert len(names) == kinds * len(layers)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_forget_experts": 2},
        {"num_forget_experts": 2, "router_layer": 2},
        {"domains": ["a", "b"], "router_layer": 2, "layers_to_transform": 3},
        {"domains": ["a", "b"], "router": "static", "expert_weights": [1.0, 0.5], "expert_scales": {"b": 0.5}},
        {"domains": ["a", "b"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
)
def test_a_config_can_be_used_for_another_model(arguments):
    """What is filled in or changed for one adapter is not carried over to the next, nor to the caller."""
    config = AlterConfig(**arguments)
    given = copy.deepcopy(vars(config))
    for depth in (4, 10):
        model = get_peft_model(make_llama(64, num_hidden_layers=depth, tie_word_embeddings=True), config)
        own = model.peft_config["default"]
        first = max(arguments.get("router_layer", 1), round(0.4 * depth))
        layers = list(range(first, depth)) if config.is_gated else None
        assert own.router_layer == (arguments.get("router_layer", 1) if config.is_gated else None)
        assert own.layers_to_transform == ([3] if "layers_to_transform" in arguments else layers)
        assert own.num_forget_experts == arguments.get("num_forget_experts", len(arguments.get("domains", [0])))
        # PEFT itself notes the base model's name in what it is given
        assert {**vars(config), "base_model_name_or_path": None} == {**given, "base_model_name_or_path": None}
        config.base_model_name_or_path = None
        assert model.base_model.model.peft_config is model.peft_config


def test_adapters_of_one_config_are_changed_one_by_one(llama):
    config = AlterConfig(domains=["a", "b", "c"], router_layer=2, layers_to_transform=[2, 3])
    model = get_peft_model(llama, config)
    model.add_adapter("other", config)
    model.base_model.set_expert_scale("a", 0.0, adapter_name="default")
    model.base_model.delete_expert("b", adapter_name="default")
    own, other = model.peft_config["default"], model.peft_config["other"]
    assert own.domains == ["a", "c"] and own.expert_scales == {"a": 0.0}
    assert other.domains == config.domains == ["a", "b", "c"] and other.expert_scales is None
    assert list(model.base_model.list_experts(adapter_name="other")) == ["a", "b", "c"]
    own.layers_to_transform.append(7)
    assert other.layers_to_transform == config.layers_to_transform == [2, 3]


def test_rank_and_alpha_patterns(llama):
    config = AlterConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4})
    model = get_peft_model(llama, config)
    layer = model.get_submodule("base_model.model.model.layers.3.self_attn")
    assert layer.q_proj.alter_A["default"].weight.shape == (2, 32) and layer.q_proj.scaling["default"] == 8.0
    assert layer.v_proj.alter_A["default"].weight.shape == (8, 32) and layer.v_proj.scaling["default"] == 0.5


def test_rslora_scale(llama):
    model = get_peft_model(llama, AlterConfig(r=4, lora_alpha=6, use_rslora=True))
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, AlterLinear)} == {3.0}


def test_lm_head_is_refused(llama):
    with pytest.raises(ValueError, match=r"contains the LM head .* use `AlterConfig\(router='static'\)`"):
        get_peft_model(llama, AlterConfig(target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("router", ["context", "entropy"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_mlp, "transformers causal LM, but got a Sequential"),
        (tiny_t5, "T5ForConditionalGeneration has an encoder"),
        (None, "LlamaModel has no output embeddings"),
    ],
    ids=["mlp", "t5", "headless"],
)
def test_models_that_a_gated_router_cannot_serve(llama, router, make, reason):
    model: nn.Module = LlamaModel(llama.config) if make is None else make()
    targets = ["0", "2"] if make is tiny_mlp else "all-linear"
    with pytest.raises(ValueError, match=reason) as caught:
        get_peft_model(model, AlterConfig(router=router, target_modules=targets))
    assert "router='static'" in str(caught.value)


def test_static_router_on_an_mlp():
    base, x = tiny_mlp(), torch.randn(5, 6)
    expected = base(x)
    config = AlterConfig(router="static", target_modules=["0", "2"], num_forget_experts=2, expert_weights=[0.5, -1.0])
    model = get_peft_model(base, config).eval()
    assert adapted(model) == ["base_model.model.0", "base_model.model.2"]
    assert torch.equal(model(x), expected)
    layer = model.get_submodule("base_model.model.2")
    for expert in layer.alter_B["default"].experts():
        nn.init.normal_(expert)
    retain, first, second = layer.alter_B["default"].experts()
    update = (retain + 0.5 * first - second) @ layer.alter_A["default"].weight * 2.0  # Eq. 6, s = 16 / 8
    hidden = base[0](x).relu()
    torch.testing.assert_close(model(x), expected + hidden @ update.T)


@torch.no_grad()
def test_static_router_on_t5():
    base = tiny_t5()
    inputs = {"input_ids": torch.randint(1, 50, (2, 7)), "decoder_input_ids": torch.randint(1, 50, (2, 5))}
    expected = base(**inputs).logits
    model = get_peft_model(base, AlterConfig(router="static", init_weights=False, task_type="SEQ_2_SEQ_LM")).eval()
    changed = model(**inputs).logits
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    assert model.generate(input_ids=inputs["input_ids"], max_new_tokens=3).shape[0] == 2


@torch.no_grad()
def test_static_router_on_bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
    )  # fmt: skip
    base = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 50, (2, 7))
    expected = base(ids).logits
    model = get_peft_model(base, AlterConfig(router="static", init_weights=False, task_type="SEQ_CLS")).eval()
    assert not torch.allclose(model(input_ids=ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("router", ["context", "static"])
def test_unsupported_target_names_the_module(llama, router):
    with pytest.raises(ValueError, match=r"'model\.layers\.3\.self_attn' is a LlamaAttention"):
        get_peft_model(llama, AlterConfig(router=router, target_modules=["layers.3.self_attn"]))


def test_values_that_peft_takes_too():
    config = AlterConfig(lora_alpha=0.5, alpha_pattern={"q_proj": 2.5}, modules_to_save=[], trainable_token_indices={})
    assert (config.lora_alpha, config.alpha_pattern) == (0.5, {"q_proj": 2.5})
    assert config.modules_to_save is None and config.trainable_token_indices is None
    assert AlterConfig(base_model_name_or_path=Path("a/b")).base_model_name_or_path == "a/b"
