# SPDX-License-Identifier: Apache-2.0
"""Experts without a token, and adapters without one, are left out: to rounding, nothing else changes."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from tiny_models import VOCAB, add, base_model, config
from transformers import DynamicCache

from alter_peft import AlterConfig
from alter_peft.tuner import hooks, shares
from alter_peft.tuner.layer import AlterLayer
from alter_peft.tuner.router import ROUNDING, gate
from alter_peft.tuner.shares import look, shares_of


IDS = torch.randint(4, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :9] = LEFT[1, :1] = 0
RIGHT[0, -9:] = RIGHT[1, -1:] = 0
FAMILIES = ["llama", "gpt2", "opt", "mistral"]


@pytest.fixture(autouse=True)
def grouping(monkeypatch):
    """Tokens are grouped by as few experts as these adapters have."""
    monkeypatch.setattr(shares, "FEW", 2)


def adapted(family: str = "llama", **arguments) -> PeftModel:
    """A random adapter of four forget experts on a random model, in float64 but for the router."""
    model = base_model(family).double()
    torch.manual_seed(1)
    options = {"num_forget_experts": 4, **arguments}
    return get_peft_model(model, config(family, **options), autocast_adapter_dtype=False).double().eval()


def layers_of(model: PeftModel) -> list[AlterLayer]:
    return [module for module in model.modules() if isinstance(module, AlterLayer)]


def state_of(model: PeftModel):
    return layers_of(model)[0].context.state


@contextmanager
def all_experts():
    """Inside, nothing is looked up: every layer multiplies by all experts, as a compiled graph does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "may_look", lambda gates: False)
        yield


@torch.no_grad()
def logits(model: PeftModel, mask: torch.Tensor = LEFT, **arguments) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=mask, **arguments).logits[mask.bool()]


def generated(model: PeftModel, **arguments) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**{"input_ids": IDS, "attention_mask": LEFT, **options, **arguments})


def rest(model: PeftModel, name: str = "default") -> None:
    """B_r at zero, as it is where the retain expert rests."""
    with torch.no_grad():
        for layer in layers_of(model):
            layer.alter_B[name].retain.zero_()


def send(model: PeftModel, expert: int, name: str = "default") -> None:
    """All tokens to one expert."""
    router = layers_of(model)[0].context.routers[0].alter_router[name]
    router.weight.data.zero_()
    router.bias.data.zero_()[expert] = 9.0


@contextmanager
def counted(model: PeftModel, name: str = "default"):
    """How often an A of this adapter is multiplied by."""
    calls: list[None] = []
    handles = [layer.alter_A[name].register_forward_hook(lambda *_: calls.append(None)) for layer in layers_of(model)]
    yield calls
    for handle in handles:
        handle.remove()


# ---- gates ----------------------------------------------------------------------------------------------------------


def test_a_gate_within_rounding_is_one_expert_s():
    logits = torch.tensor([[0.0, 0.17, -3.0], [0.2, 0.0, 0.1], [0.0, 0.15, 0.3]])
    gates, plain = gate(logits, None, 0.8, 0.01, 3), (logits / 0.01).softmax(-1)
    assert torch.equal(gates[0], torch.tensor([0.0, 1.0, 0.0])) and not torch.equal(plain[0], gates[0])
    torch.testing.assert_close(gates, plain, atol=2 * ROUNDING, rtol=0)


def test_nearly_even_experts_share_a_token_as_the_softmax_has_it():
    logits = torch.tensor([[0.0, 0.01, 0.05], [0.3, 0.3, -0.5]])
    gates, plain = gate(logits, None, 0.8, 0.01, 3), (logits / 0.01).softmax(-1)
    assert torch.equal(gates[0], plain[0]) and torch.equal(gates[1], torch.tensor([0.5, 0.5, 0.0]))


# ---- a pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"inference_entropy": "base"}, {"router": "entropy"}, {"temperature_low": 1.0},
        {"expert_scales": {"forget_1": 0.5}},
    ],
    ids=["context", "base", "entropy", "soft", "scaled"],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_that_of_all_experts(family, arguments, mask):
    model = adapted(family, **arguments)
    found, state = logits(model, mask), state_of(model)
    with all_experts():
        expected = logits(model, mask)
        assert not state_of(model).shares
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert state.shares
    if not arguments:
        assert state.shares["default"].grouped is not None  # so that equality says something


def test_grouped_tokens_may_have_several_experts():
    model = adapted(inference_entropy="base", entropy_threshold=1.0)
    context = layers_of(model)[0].context
    entropy = torch.zeros(IDS.shape)
    entropy[:, ::7] = 2.0  # every seventh token has the retain expert and three others
    with context.supply(entropy=entropy):
        found, grouped = logits(model), state_of(model).shares["default"].grouped
        with all_experts():
            torch.testing.assert_close(found, logits(model), rtol=1e-9, atol=1e-9)
    assert grouped is not None and grouped.places is None


def test_one_row_has_its_experts_alone():
    model = adapted()
    send(model, 3)
    found = logits(model)
    own = state_of(model).shares["default"]
    assert own.experts == (3,) and own.whole
    with all_experts():
        torch.testing.assert_close(found, logits(model), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for layer in layers_of(model):
            for e in (0, 1, 2, 4):
                layer.alter_B["default"].expert(e).fill_(float("nan"))
    assert torch.equal(logits(model), found)  # the others are not read at all


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_decoding_is_that_of_all_experts(strategy):
    model, prompt = adapted(), {}
    if "prompt_lookup_num_tokens" in strategy:
        ids = IDS[2:, :6].repeat(1, 3)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = generated(model, **prompt, **strategy)
    with all_experts():
        assert torch.equal(found, generated(model, **prompt, **strategy))
    if not strategy:
        assert torch.equal(found, generated(model, use_cache=False))


def test_rows_of_a_mixed_batch():
    model = adapted()
    add(model, "other", "llama", num_forget_experts=3)
    model.double().eval()
    names = ["other", "__base__", "default"]
    found = logits(model, adapter_names=names)
    with all_experts():
        torch.testing.assert_close(found, logits(model, adapter_names=names), rtol=1e-9, atol=1e-9)
    rest(model, "other")
    send(model, 0, "other")
    with counted(model, "other") as calls:
        logits(model, adapter_names=names)
    assert not calls


# ---- the retain expert at rest --------------------------------------------------------------------------------------


def test_retained_text_is_the_base_s_own_and_costs_no_layer_anything():
    model = adapted()
    rest(model)
    send(model, 0)
    with model.disable_adapter():
        expected, tokens = logits(model), generated(model)
    with counted(model) as calls:
        assert torch.equal(logits(model), expected) and torch.equal(generated(model), tokens)
    assert not calls and state_of(model).idle == {"default"}


@pytest.mark.parametrize("write", ["data", "in place", "load", "replace"])
def test_a_retain_expert_that_is_written_acts_at_once(write):
    model = adapted()
    rest(model)
    send(model, 0)
    before, bank = logits(model), layers_of(model)[0].alter_B["default"]
    value = torch.ones_like(bank.retain)
    if write == "data":
        bank.retain.data.copy_(value)
    elif write == "in place":
        with torch.no_grad():
            bank.retain.copy_(value)
    elif write == "load":
        bank.load_state_dict({"retain": value}, strict=False)
    else:
        bank.retain = torch.nn.Parameter(value)
    found = logits(model)
    assert not torch.allclose(found, before)
    with all_experts():
        torch.testing.assert_close(found, logits(model), rtol=1e-9, atol=1e-9)


def test_it_goes_on_resting_with_a_cache_and_is_looked_at_with_the_next():
    model = adapted()
    rest(model)
    send(model, 0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in [(0, 1), (1, 2), (2, 3)]:  # a first pass of one token looks, too
            model(input_ids=IDS[:, start:stop], past_key_values=cache)
            assert state_of(model).idle == {"default"}
    assert not state_of(copy.deepcopy(model)).gates and torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_it_learns_where_it_has_rows():
    model = adapted().train()
    rest(model)
    send(model, 0)
    context = layers_of(model)[0].context
    with context.supply("default", owner=torch.tensor([[1, 0, 0, 0, 0]] * 3)):
        model(input_ids=IDS).logits.square().mean().backward()
    assert all(layer.alter_B["default"].retain.grad.any() for layer in layers_of(model))


# ---- training -------------------------------------------------------------------------------------------------------


def gradients(model: PeftModel, owner: torch.Tensor | None, **who) -> dict[str, torch.Tensor]:
    model.zero_grad()
    context = layers_of(model)[0].context
    with context.supply("default", owner=owner, **who):
        loss = model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT.bool()].square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


OWNERS = {
    "each": torch.eye(5, dtype=torch.long)[[1, 2, 4]],
    "one": torch.eye(5, dtype=torch.long)[[3, 3, 3]],
    "retain": torch.eye(5, dtype=torch.long)[[0, 1, 0]],
}


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(
    ("arguments", "few"), [({}, 2), ({}, 8), ({"temperature_low": 1.0}, 2)], ids=["grouped", "at once", "soft"]
)
def test_gradients_are_those_of_all_experts(arguments, few, owner, checkpointing, monkeypatch):
    monkeypatch.setattr(shares, "FEW", few)
    model = adapted(**arguments).train()
    with all_experts():
        expected = gradients(model, owner)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, owner)
    assert state_of(model).shares and expected
    for name in found.keys() | expected.keys():  # one may be zero where the other is of rounding
        zero = torch.zeros_like(model.get_parameter(name))
        torch.testing.assert_close(found.get(name, zero), expected.get(name, zero), rtol=1e-8, atol=1e-12, msg=name)
    reached = {name.rpartition(".")[2] for name in found if ".alter_B." in name}
    assert reached <= {("retain", "forget_0", "forget_1", "forget_2", "forget_3")[e] for e in owner.nonzero()[:, 1]}


def test_each_expert_s_gradient_is_that_of_its_own_rows_alone(monkeypatch):
    """In the last layer, above which rows do not meet: against the sum of Eq. 9, written out."""
    monkeypatch.setattr(shares, "FEW", 8)
    model, owner = adapted(router_layer=3, temperature_low=1.0).train(), OWNERS["each"]
    found = gradients(model, owner)
    for row, expert in enumerate(owner.argmax(dim=1).tolist()):
        with all_experts():
            others = torch.zeros_like(owner)
            others[row, expert] = 1
            expected = gradients(model, others)
        name = f"down_proj.alter_B.default.forget_{expert - 1}"
        own = [key for key in found if key.endswith(name)]
        assert own and {key.rpartition(".")[2] for key in expected if ".alter_B." in key} == {f"forget_{expert - 1}"}
        torch.testing.assert_close(found[own[0]], expected[own[0]], rtol=1e-9, atol=1e-12)


def test_a_mixed_precision_training_reaches_the_owned_alone():
    model = adapted().float().train()
    with layers_of(model)[0].context.supply("default", owner=OWNERS["each"]), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS).logits.float().square().mean()
    loss.backward()
    learned = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None and ".alter_B." in name]
    assert {name.rpartition(".")[2] for name, grad in learned if grad.any()} <= {"forget_0", "forget_1", "forget_3"}
    assert any(grad.any() for _, grad in learned) and all(grad.isfinite().all() for _, grad in learned)


def test_only_a_is_reached_where_no_expert_learns():
    model = adapted().train()
    with all_experts():
        expected = gradients(model, None, learns_experts=False)
    found = gradients(model, None, learns_experts=False)
    assert found.keys() == expected.keys() and all(".alter_A." in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def test_a_plain_training_gives_every_expert_a_gradient():
    model = adapted().train()
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".alter_B." in name)


def test_an_expert_that_has_rows_but_no_token_has_a_gradient_of_zeros():
    model = adapted().train()
    send(model, 1)
    with layers_of(model)[0].context.supply("default", owner=OWNERS["each"]):
        model(input_ids=IDS).logits.square().mean().backward()
    bank = layers_of(model)[0].alter_B["default"]
    assert bank.expert(1).grad.any() and not bank.expert(2).grad.any() and bank.expert(3).grad is None


def test_an_expert_that_has_tokens_but_no_rows_has_no_gradient_and_no_empty_group():
    model = adapted().train()
    with layers_of(model)[0].context.supply("default", owner=OWNERS["one"]):
        model(input_ids=IDS).logits.square().mean().backward()
        grouped = state_of(model).shares["default"].grouped
    assert grouped is not None and len({e for e, _, _ in grouped.parts}) > 2
    assert {e for e, _, learns in grouped.parts if learns} == {3}
    assert all(count for e, count, _ in grouped.parts if e != 3)
    bank = layers_of(model)[0].alter_B["default"]
    assert [e for e in range(5) if bank.expert(e).grad is not None] == [3]


# ---- many adapters --------------------------------------------------------------------------------------------------


def several(count: int = 5) -> PeftModel:
    model = get_peft_model(make_llama(VOCAB).double(), AlterConfig(r=2, init_weights=False, task_type="CAUSAL_LM"))
    for index in range(1, count):
        torch.manual_seed(index)
        half_life = 16.0 if index % 2 else 4.0
        options = {"num_forget_experts": 1 + index % 3, "router_half_life": half_life, "router_hidden_size": 8}
        model.add_adapter(str(index), AlterConfig(r=2, init_weights=False, task_type="CAUSAL_LM", **options))
    model.base_model.set_adapter(["default", *map(str, range(1, count))])
    for layer in layers_of(model):  # so large that tokens differ
        for bank in layer.alter_B.values():
            for expert in bank.experts():
                expert.data.mul_(4)
    return model.double().eval()


@pytest.mark.parametrize(
    "strategy", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_several_adapters_are_what_all_their_experts_are(strategy):
    model = several()
    if "cache_implementation" in strategy:
        strategy = {**strategy, "disable_compile": True}
    with all_experts():
        expected, tokens = logits(model), generated(model, use_cache=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    if "num_beams" in strategy:
        with all_experts():
            tokens = generated(model, use_cache=False, **strategy)
    assert torch.equal(generated(model, **strategy), tokens)


def test_of_several_adapters_those_without_a_token_do_nothing():
    model = several()
    for name in model.peft_config:
        rest(model, name)
        send(model, 0, name)
    send(model, 1, "3")
    with all_experts():
        expected = logits(model)
    with counted(model, "2") as others, counted(model, "3") as calls:
        torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert calls and not others and state_of(model).idle == {"default", "1", "2", "4"}


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_looking_finds_who_has_a_token_and_who_has_all():
    gates = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    mixed = torch.tensor([[[0.0, 0.25, 0.75], [0.0, 0.0, 1.0]]])
    assert look({"a": gates, "b": mixed, "c": gates[..., :2]}) == {
        "a": ((0,), (0,)), "b": ((1, 2), ()), "c": ((0,), (0,)),
    }  # fmt: skip


def test_a_scaled_expert_is_not_whole():
    gates = torch.tensor([[[0.0, 1.0]] * 3])
    assert shares_of(gates, gates, (1,), (1,), None).whole
    halved = shares_of(gates, gates * 0.5, (1,), (1,), None)
    assert not halved.whole and torch.equal(halved.gates, torch.full((1, 3, 1), 0.5))
