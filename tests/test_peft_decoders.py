# SPDX-License-Identifier: Apache-2.0
"""What PEFT's test_decoder_models checks for every method, for gated and static adapters on every family."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import DECODERS, IDS, MASK, adapted, add, base_model, config, generate, inputs, outputs
from torch import nn

from alter_peft.tuner.layer import AlterLinear


families = pytest.mark.parametrize("family", DECODERS)
routers = pytest.mark.parametrize("router", ["context", "static"])
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of one backward pass, dropout off."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@families
@routers
def test_fresh_disabled_and_unloaded_are_the_base(family, router):
    expected = outputs(base_model(family), family)
    assert torch.equal(outputs(adapted(family, router=router, init_weights=True), family), expected)
    model = adapted(family, router=router)
    changed = outputs(model, family)
    assert not torch.allclose(changed, expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(outputs(model, family), expected)
    assert torch.equal(outputs(model, family), changed)
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded, family), expected)
    assert not any("alter" in name or "router." in name for name, _ in unloaded.named_modules() if "token" in name)


@families
@routers
def test_generation(family, router):
    model = adapted(family, router=router)
    expected = generate(model, use_cache=False)
    assert torch.equal(generate(model), expected)
    assert not torch.equal(expected, generate(base_model(family)))
    beams = generate(model, num_beams=2)
    assert torch.equal(beams, generate(model, num_beams=2, use_cache=False))
    alone = generate(model, input_ids=IDS[:1, 4:], attention_mask=MASK[:1, 4:])  # without its padding and neighbours
    assert torch.equal(alone[0, 6:], expected[0, 10:])
    positional = model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(positional[:, 10], expected[:, 10])


@families
@routers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_half_precision(family, router, dtype):
    model = adapted(family, router=router).to(dtype)
    found = generate(model, max_new_tokens=2)
    assert found.shape == (3, 12) and outputs(model, family).dtype == dtype


@families
@routers
def test_saved_and_loaded(family, router, tmp_path):
    model = adapted(family, router=router)
    model.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    assert torch.equal(outputs(loaded.eval(), family), outputs(model, family))
    assert loaded.peft_config["default"].inference_mode and not any(p.requires_grad for p in loaded.parameters())


@families
@routers
def test_training_reaches_the_adapter_alone(family, router):
    model = adapted(family, router=router)
    reached = trained(model)
    adapter = {name for name, _ in model.named_parameters() if ".alter_A." in name or ".alter_B." in name}
    assert set(reached) == adapter and all(gradient.isfinite().all() for gradient in reached.values())
    last = {"layers_to_transform": [2]}
    assert 0 < len(trained(adapted(family, router=router, **last))) < len(reached)


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`prepare_model_for_gradient_checkpointing`:FutureWarning")
@families
@routers
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(family, router, use_reentrant):
    model = adapted(family, router=router)
    expected = trained(model)
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = trained(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@families
def test_static_adapters_merge(family):
    model = adapted(family, router="static", expert_weights=[0.5, -1.0])
    add(model, "other", family, router="static")
    model.base_model.set_adapter(["default", "other"])
    expected, base = outputs(model, family), outputs(base_model(family), family)
    seen = MASK.bool()
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, family)[seen], expected[seen], atol=2e-3, rtol=1e-3)
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(outputs(model, family)[seen], base[seen], atol=2e-3, rtol=1e-3)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(outputs(merged, family)[seen], expected[seen], atol=2e-3, rtol=1e-3)
    assert not any(isinstance(module, AlterLinear) for module in merged.modules())


@families
def test_gated_adapters_refuse_to_merge(family):
    model = adapted(family)
    expected = outputs(model, family)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"gates every token by itself .*router='static'"):
            merge()
    assert torch.equal(outputs(model, family), expected)


@families
@routers
def test_embeddings_as_inputs(family, router):
    model = adapted(family, router=router)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(IDS)
        found = model(inputs_embeds=embeddings, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], outputs(model, family)[MASK.bool()], **CLOSE)


@families
def test_mixed_batch(family):
    model = adapted(family)
    add(model, "other", family, router_layer=2)
    rows, expected = ["default", "other", "__base__"], []
    for row, name in enumerate(rows[:2]):
        model.set_adapter(name)
        expected.append(generate(model)[row])
    expected.append(generate(base_model(family))[2])
    assert torch.equal(generate(model, adapter_names=rows), torch.stack(expected))


@families
def test_half_precision_rounds_no_router(family):
    model = adapted(family)
    before = {name: p.clone() for name, p in model.named_parameters() if "alter_router" in name}
    assert before
    for move in (model.half, model.double, lambda: model.to(torch.bfloat16), lambda: model.to("cpu")):
        move()
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], p) and own[name].dtype == torch.float32 for name, p in before.items())


@families
def test_autocast_adapter_dtype(family):
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(base_model(family).to(torch.bfloat16), config(family), autocast_adapter_dtype=autocast)
        model.add_adapter("other", config(family), autocast_adapter_dtype=autocast)
        experts = {p.dtype for name, p in model.named_parameters() if ".alter_A." in name or ".alter_B." in name}
        routers_ = {p.dtype for name, p in model.named_parameters() if ".alter_router." in name}
        assert experts == {expected} and routers_ == {torch.float32}
        assert outputs(model.eval(), family).isfinite().all()


def test_experts_of_a_mixture_are_left_alone():
    """Their weights are 3-dimensional Parameters, which no linear adapter takes; attention is adapted."""
    model = adapted("qwen3_moe")
    names = [name for name, module in model.named_modules() if isinstance(module, AlterLinear)]
    assert len(names) == 8 and all(".self_attn." in name for name in names)
    assert inputs("qwen3_moe").keys() == {"input_ids", "attention_mask"}


def test_layers_that_flatten_their_tokens_are_gated_too():
    model = adapted("opt")
    assert [n for n, m in model.named_modules() if isinstance(m, AlterLinear) and n.endswith(("fc1", "fc2"))]
    with torch.no_grad():
        one = model(input_ids=IDS[2:]).logits
    torch.testing.assert_close(one, outputs(model, "opt")[2:], **CLOSE)
    with pytest.raises(ValueError, match=r"input of shape \(7,\) before its last dimension"):
        model.get_submodule("base_model.model.model.decoder.layers.2.fc1")(torch.randn(7, 32))
