# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_tuner import IDS, MASK, MODES, adapted, base_model, config, context_of, gradients, logits
from torch import nn
from trainer_setup import make_trainer

from alter_peft import AlterConfig
from alter_peft.tuner.layer import AlterLinear


DOMAINS = ["person", "secret recipe", "project"]
routers = pytest.mark.parametrize(
    "router", [*MODES, {"router": "static"}], ids=["context", "context-base", "entropy", "static"]
)


def model_of(**arguments) -> PeftModel:
    return adapted(**{"num_forget_experts": None, "domains": DOMAINS, **arguments})


def layers_of(model: nn.Module) -> list[AlterLinear]:
    return [module for module in model.modules() if isinstance(module, AlterLinear)]


def with_experts_times(model: PeftModel, factors: dict[str, float]) -> PeftModel:
    """A copy whose experts themselves are multiplied: what a scale must be equal to."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(twin):
            for domain, factor in factors.items():
                layer.alter_B["default"].get_parameter(f"forget_{DOMAINS.index(domain)}").mul_(factor)
    return twin


def gates_of(model: PeftModel) -> torch.Tensor:
    logits(model, mask=None)
    return context_of(model).state.gates["default"]


# Listing


def test_listing_names_scales_and_norms():
    model = model_of()
    model.set_expert_scale("project", -0.5)
    found = model.list_experts()
    assert list(found) == DOMAINS and [expert.scale for expert in found.values()] == [1.0, 1.0, -0.5]
    for d, expert in enumerate(found.values()):
        square = sum(
            (layer.scaling["default"] * B @ layer.alter_A["default"].weight).detach().square().sum()
            for layer in layers_of(model)
            for B in [layer.alter_B["default"].get_parameter(f"forget_{d}")]
        )
        assert expert.norm == pytest.approx(square.item() ** 0.5, rel=1e-4) and expert.norm > 0
    assert all(expert.norm == 0 for expert in model_of(init_weights=True).list_experts().values())


def test_listing_says_what_is_active():
    model = model_of()
    model.set_expert_scale("person", 0)

    def active(name="default"):
        return [expert.active for expert in model.list_experts(name).values()]

    assert active() == [False, True, True]
    with model.disable_adapter():
        assert active() == [False] * 3
    model.add_adapter("second", config())
    assert active("second") == [False, False] and list(model.list_experts("second")) == ["forget_0", "forget_1"]
    model.set_adapter("second")
    assert active() == [False] * 3 and active("second") == [True, True]


# Scales


@pytest.mark.parametrize(
    ("router", "factor"),
    [*((mode, 0.0) for mode in MODES), (MODES[0], 0.5), ({"router": "static"}, 0.0)],
    ids=["context", "context-base", "entropy", "context-half", "static"],
)
def test_a_scale_is_the_expert_times_it_bit_for_bit(router, factor):
    model = model_of(**router)
    plain, changed = logits(model), 0
    for domain in DOMAINS:
        expected = logits(with_experts_times(model, {domain: factor}))
        changed += not torch.equal(expected, plain)
        with model.experts({domain: factor}):
            assert torch.equal(logits(model), expected)
        model.set_expert_scale(domain, factor)
        assert torch.equal(logits(model), expected)
        model.set_expert_scale(domain, 1)
        assert torch.equal(logits(model), plain)
    assert changed  # so that equality says something


def test_text_of_an_expert_that_is_off_is_answered_by_the_base():
    model = model_of()
    nn.init.zeros_(router := context_of(model).routers[0].alter_router["default"].weight)
    context_of(model).routers[0].alter_router["default"].bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert not router.any() and not torch.allclose(logits(model), logits(base_model()))
    with model.experts({"secret recipe": 0.0}):
        assert torch.equal(logits(model), logits(base_model()))


def test_contexts_nest_and_end_with_an_error():
    model = model_of(temperature_low=5.0)
    model.set_expert_scale("person", 0.5)
    plain = logits(model)
    expected = logits(with_experts_times(model, {"project": 0.0, "secret recipe": 2.0}))
    with model.experts(project=0.0):
        outer = logits(model)
        with model.experts({"secret recipe": 2.0}):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), outer)
        with pytest.raises(KeyError, match="broken"), model.experts(person=1.0):
            assert not torch.equal(logits(model), outer)
            raise KeyError("broken")
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), plain) and not torch.equal(outer, plain)


@routers
def test_rows_have_their_own_scales(router):
    model = model_of(**router, **({} if router["router"] == "static" else {"temperature_low": 5.0}))
    on = logits(model)
    with model.experts(person=0.0):
        off = logits(model)
    with model.experts(person=[1.0, 0.0, 1.0]):
        rows = logits(model)
    assert torch.equal(rows[[0, 2]], on[[0, 2]]) and torch.equal(rows[1], off[1]) and not torch.equal(on[1], off[1])
    with model.experts(person=torch.tensor([1.0, 0.0, 1.0]), project=0.0), model.experts(project=1.0):
        assert torch.equal(logits(model), rows)


@pytest.mark.parametrize(
    ("router", "beams"), [(MODES[0], 1), (MODES[1], 3), ({"router": "static"}, 3)], ids=["context", "base", "static"]
)
def test_rows_generate_as_if_alone(router, beams):
    model = model_of(**router)
    arguments = {
        "input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "num_beams": beams,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    on = model.generate(**arguments)
    domain = next(d for d in DOMAINS if not torch.equal(_generate_without(model, d, arguments), on))
    off = _generate_without(model, domain, arguments)
    scales = torch.tensor([0.0, 1.0, 0.0])
    for use_cache in (True, False):
        with model.experts({domain: scales.repeat_interleave(beams)}):
            found = model.generate(**arguments, use_cache=use_cache)
        assert torch.equal(found, torch.where(scales.bool()[:, None], on, off))


def test_rows_of_a_mixed_batch_have_their_own_scales():
    """A number for each row of the batch, whichever adapter it has."""
    model = model_of()
    model.add_adapter("other", copy.copy(config(init_weights=False)))
    model.eval()
    names = ["default", "other", "default"]
    on = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits
    with model.experts({"person": 0.0}, adapter_name="default"):
        off = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits
    with model.experts({"person": [1.0, 1.0, 0.0]}, adapter_name="default"):
        rows = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits
    assert torch.equal(rows[:2], on[:2]) and torch.equal(rows[2], off[2]) and not torch.equal(on[2], off[2])
    with model.experts({"person": [1.0, 0.0]}, adapter_name="default"):
        with pytest.raises(ValueError, match="scales for 2 rows, but the batch has 3"):
            model(input_ids=IDS, attention_mask=MASK, adapter_names=names)


def _generate_without(model, domain, arguments):
    with model.experts({domain: 0.0}):
        return model.generate(**arguments)


def test_rows_of_a_model_without_tokens():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model = get_peft_model(mlp, config(router="static", target_modules=["0", "2"], task_type=None)).eval()
    x = torch.randn(3, 6)
    on = model(x)
    with model.experts(forget_0=0.0):
        off = model(x)
    with model.experts(forget_0=[0.0, 1.0, 0.0]):
        torch.testing.assert_close(model(x), torch.stack([off[0], on[1], off[2]]))
    assert not torch.allclose(on, off)


def test_a_batch_of_another_size_raises():
    model = model_of()
    with model.experts(person=[0.0, 1.0]):
        with pytest.raises(ValueError, match=r"scales for 2 rows, but the batch has 3.*repeat_interleave"):
            logits(model)
        with pytest.raises(ValueError, match=r"scales for 2 rows, but the batch has 4"):
            model.generate(input_ids=IDS[:2], max_new_tokens=2, num_beams=2, do_sample=False)


def test_another_adapter_is_not_touched():
    model = model_of()
    torch.manual_seed(2)
    model.add_adapter("second", config(domains=["person", "other"]))
    model.set_adapter("second")
    expected = logits(model)
    model.set_expert_scale("person", 0.0, adapter_name="default")
    model.delete_expert("project", adapter_name="default")
    assert torch.equal(logits(model), expected)
    assert model.list_experts("second")["person"].scale == 1 and model.list_experts("default")["person"].scale == 0
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"`adapter_name` is None, but \['default', 'second'\] are active"):
        model.list_experts()
    with model.experts(person=1.0, adapter_name="default"):
        assert not torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)


# Training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_saved_scales_are_the_same_when_checkpoints_are_recomputed():
    model = model_of(temperature_low=5.0).train()
    model.set_expert_scale("person", 0.0)
    expected = gradients(model, [IDS])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, [IDS])
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
        if ".alter_B." in name:
            assert gradient.any() != name.endswith("forget_0"), name


@pytest.mark.parametrize("router", [{}, {"router": "static"}], ids=["context", "static"])
def test_temporary_scales_in_training_raise(router):
    model = model_of(**router).train()
    with model.experts(person=0.0), pytest.raises(ValueError, match=r"in training mode. Call `model.eval\(\)`"):
        model(input_ids=IDS)
    model(input_ids=IDS)


def test_trainer_refuses_scaled_experts(tokenizer, tmp_path):
    trained = AlterConfig(domains=["home", "bread"], r=4, expert_scales={"home": 0.5})
    model = get_peft_model(make_llama(len(tokenizer)), trained)
    with pytest.raises(ValueError, match=r"`expert_scales` is \{'home': 0.5\}, but experts are trained at scale 1"):
        make_trainer(tmp_path, tokenizer, model=model)
    model.set_expert_scale("home", 1)
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    model.set_expert_scale("bread", 0)
    with pytest.raises(ValueError, match=r"`expert_scales` is \{'bread': 0.0\}"):
        trainer.train()


# Saving and deleting


@routers
def test_scales_are_saved_with_the_adapter(tmp_path, router):
    model = model_of(**router)
    plain = logits(model)
    for domain, scale in zip(DOMAINS, [0.0, 0.25, 1.0], strict=True):
        model.set_expert_scale(domain, scale)
    assert not torch.equal(logits(model), plain)
    with model.experts(project=0.0):  # a temporary scale isn't
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["expert_scales"] == {
        "person": 0.0,
        "secret recipe": 0.25,
    }
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and loaded.list_experts() == model.list_experts()
    for domain in DOMAINS:
        loaded.set_expert_scale(domain, 1)
    assert loaded.peft_config["default"].expert_scales is None and torch.equal(logits(loaded), plain)


@pytest.mark.parametrize("d", [0, 1, 2])
def test_deleting_an_expert_changes_no_token_of_another(d):
    model = model_of().double()
    # position 0 has no context, so that its gates are those of the bias
    context_of(model).routers[0].alter_router["default"].bias.data = torch.tensor([1.2, 0.0, 0.0, 0.0])
    gates, before = gates_of(model), logits(model, mask=None)
    parameters = dict(model.named_parameters())
    model.delete_expert(DOMAINS[d])
    after = logits(model, mask=None)
    # every token so far was sent to one other expert alone
    untouched = ((gates[..., 1 + d] == 0) & (gates.amax(-1) == 1)).cumprod(dim=1).bool()
    assert untouched.sum() >= 4 and not untouched.all()
    # the experts of the other tokens decide in which order a layer adds up
    torch.testing.assert_close(after[untouched], before[untouched], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[~untouched], before[~untouched])

    names = [name for name in DOMAINS if name != DOMAINS[d]]
    assert list(model.list_experts()) == names == model.peft_config["default"].domains
    for layer in layers_of(model):
        assert layer.alter_B["default"].names() == ["retain", "forget_0", "forget_1"]
        assert len(layer.alter_B["default"].experts()) == 3
    kept = {id(parameter) for parameter in model.parameters()}
    gone = {name for name, parameter in parameters.items() if id(parameter) not in kept}
    assert all(name.endswith(f"forget_{d}") or ".alter_router." in name for name in gone)
    assert len(gone) == len(layers_of(model)) + 2


@routers
def test_an_adapter_without_the_expert_is_saved_and_loaded(tmp_path, router):
    weights = {"expert_weights": [0.5, 1.5, -1.0]} if router["router"] == "static" else {}
    model = model_of(**router, **weights)
    model.set_expert_scale("project", 0.5)
    model.set_expert_scale("secret recipe", 0.0)
    expected = logits(model)
    model.delete_expert("secret recipe")
    if router["router"] == "static":
        torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["domains"] == ["person", "project"] and saved["num_forget_experts"] == 2
    assert saved["expert_scales"] == {"project": 0.5}
    assert saved["expert_weights"] == ([0.5, -1.0] if weights else None)
    assert not any(key.endswith("forget_2") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and loaded.list_experts() == model.list_experts()


def test_a_router_held_as_buffers_is_the_same_router(tmp_path):
    """As training under DeepSpeed leaves it: no Parameter of it is there to be rounded or split."""
    model = model_of()
    twin, keys = copy.deepcopy(model), model.state_dict().keys()
    context_of(model).routers[0].hold_as_buffers()
    assert not any(".alter_router." in name for name, _ in model.named_parameters())
    assert model.state_dict().keys() == keys and torch.equal(logits(model), logits(twin))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path).eval()), logits(twin))
    for either in (model, twin):
        either.delete_expert("secret recipe")
    assert torch.equal(logits(model), logits(twin))


def test_unnamed_experts_keep_their_names_when_another_goes():
    model = adapted(num_forget_experts=3)
    norms = {name: expert.norm for name, expert in model.list_experts().items()}
    assert list(norms) == ["forget_0", "forget_1", "forget_2"]
    model.delete_expert("forget_0")
    del norms["forget_0"]
    assert {name: expert.norm for name, expert in model.list_experts().items()} == norms
    with pytest.raises(ValueError, match=r"`domain` is 'forget_0', but must be one of .*\['forget_1', 'forget_2'\]"):
        model.delete_expert("forget_0")


def test_what_is_left_can_be_trained():
    model = model_of(temperature_low=5.0)
    model.delete_expert("person")
    found = gradients(model.train(), [IDS])
    assert {name.rsplit(".", 1)[1] for name in found if ".alter_B." in name} == {"retain", "forget_0", "forget_1"}
    assert all(gradient.any() for gradient in found.values())
    assert not any("router" in name for name in found)


# What is not possible raises


def test_the_last_expert_stays():
    model = adapted(domains=["only"], num_forget_experts=None)
    with pytest.raises(ValueError, match=r"'only' is the only forget expert .*set_expert_scale\('only', 0\)"):
        model.delete_expert("only")


def test_a_merged_adapter_keeps_its_scales():
    model = model_of(router="static")
    model.merge_adapter()
    before = logits(model)
    for change in (
        lambda: model.set_expert_scale("person", 0),
        lambda: model.delete_expert("person"),
        lambda: model.experts(person=0.0).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"'default' is merged, .* Call `unmerge_adapter` first"):
            change()
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    with model.experts(person=0.0):
        for change in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged under the temporary scales"):
                change()
        with pytest.raises(ValueError, match="cannot be deleted within `experts`"):
            model.delete_expert("person")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"nobody": 0.0}, r"`domain` is 'nobody', but must be one of .*\['person', 'secret recipe', 'project'\]"),
        ({"person": float("nan")}, "scale of 'person' is nan, but must be a finite number"),
        ({"person": [[0.0]]}, r"scale of 'person' is \[\[0.0\]\]"),
        ({"person": [0.0, 1.0], "project": [0.0]}, r"scales are of \[1, 2\] rows"),
    ],
)
def test_unusable_scales_raise(scales, message):
    model = model_of()
    with pytest.raises(ValueError, match=message), model.experts(scales):
        pass
    assert not context_of(model).expert_scales


def test_unusable_saved_scales_raise():
    model = model_of()
    with pytest.raises(ValueError, match="`scale` is inf, but must be a finite number"):
        model.set_expert_scale("person", float("inf"))
    with pytest.raises(ValueError, match="`domain` is 'nobody'"):
        model.set_expert_scale("nobody", 0)
    with pytest.raises(ValueError, match=r"`adapter_name` is 'other', but must be one of \['default'\]"):
        model.set_expert_scale("person", 0, adapter_name="other")
    assert model.peft_config["default"].expert_scales is None
    for scales in ({"nobody": 0.0}, [0.0]):
        with pytest.raises(
            ValueError, match=r"`expert_scales` is .* a dict of numbers by domain, out of \['a', 'b'\]"
        ):
            AlterConfig(domains=["a", "b"], expert_scales=scales)
    for scale in (float("nan"), True, "0"):
        with pytest.raises(ValueError, match=r"`expert_scales\['a'\]` is .* a finite number: 1 on, 0 off"):
            AlterConfig(domains=["a", "b"], expert_scales={"a": scale})
