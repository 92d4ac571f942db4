# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from alter_peft import AlterConfig
from alter_peft.tuner.moving_average import Context, moving_average
from alter_peft.tuner.router import gate
from alter_peft.tuner.token_router import AlterRouter


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gate_rows_sum_to_one(n, top_k):
    logits = torch.randn(4, 5, 1 + n) * 5
    high = torch.rand(4, 5) > 0.5
    for mask in (None, high, ~high):
        gates = gate(logits, mask, 0.8, 0.01, top_k)
        torch.testing.assert_close(gates.sum(-1), torch.ones(4, 5))
        assert (gates >= 0).all()


def test_gate_at_the_low_temperature_is_the_single_best_expert():
    logits = torch.tensor([[0.0, 0.2, 0.1], [0.3, 0.1, 0.1], [-1.0, -5.0, 2.0]])
    best = torch.eye(3)[torch.tensor([1, 0, 2])]
    torch.testing.assert_close(gate(logits, None, 0.8, 0.01, 3), best, atol=1e-4, rtol=0)
    low = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(gate(logits, low, 0.8, 0.01, 3), gate(logits, None, 0.8, 0.01, 3))


def test_gate_of_a_high_token_keeps_retain_and_top_k():
    logits = torch.tensor([[-3.0, 1.0, 4.0, 2.0, 3.0]])
    gates = gate(logits, torch.tensor([True]), 0.8, 0.01, 2)
    kept = torch.tensor([-3.0, 4.0, 3.0])
    expected = torch.zeros(5)
    expected[[0, 2, 4]] = (kept / 0.8).softmax(-1)
    torch.testing.assert_close(gates[0], expected)


def test_gate_with_as_many_or_fewer_experts_than_top_k_is_the_plain_softmax():
    for n in (1, 2, 3):
        logits = torch.randn(6, 1 + n)
        high = torch.ones(6, dtype=torch.bool)
        torch.testing.assert_close(gate(logits, high, 0.8, 0.01, 3), (logits / 0.8).softmax(-1))


def make_router(width: int = 4, **arguments) -> AlterRouter:
    torch.manual_seed(0)
    router = AlterRouter(nn.Linear(2, 2))
    router.update_layer("default", width, AlterConfig(num_forget_experts=2, init_weights=False, **arguments))
    return router


def some_context() -> Context:
    return moving_average(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool), 8.0)


def test_context_router_reads_average_and_surprise():
    router, context, entropy = make_router(entropy_threshold=0.5), some_context(), torch.rand(2, 5)
    linear = router.alter_router["default"]
    features = torch.cat([context.average(), (entropy - 0.5).unsqueeze(-1)], dim=-1)
    torch.testing.assert_close(router.logits("default", context, entropy), linear(features))
    at_threshold = router.logits("default", context, torch.full((2, 5), 0.5))
    torch.testing.assert_close(router.logits("default", context, None), at_threshold)


def test_only_tokens_above_the_threshold_are_high():
    router, context = make_router(entropy_threshold=0.5, temperature_high=50.0), some_context()
    entropy = torch.tensor([[0.0, 0.5, 0.6, 1.0, 0.2]]).expand(2, 5)
    soft = router("default", context, entropy).max(-1).values < 0.9
    assert torch.equal(soft, entropy > 0.5)


def test_entropy_router_is_the_letter_of_eqs_7_and_9():
    """The forget experts compete, and the retain expert acts at weight 1 beside them."""
    router, entropy = make_router(router="entropy", entropy_threshold=0.5), torch.rand(2, 5)
    linear = router.alter_router["default"]
    assert linear.bias is None and linear.weight.shape == (2, 1)
    z = entropy[..., None] * linear.weight.T[0]
    torch.testing.assert_close(router.logits("default", some_context(), entropy), z)
    gates = router("default", some_context(), entropy)
    tau = torch.where(entropy > 0.5, 0.8, 0.01)[..., None]
    torch.testing.assert_close(gates, torch.cat([torch.ones(2, 5, 1), (z / tau).softmax(-1)], dim=-1))
    assert torch.equal(router.config["default"].routing.competing(gates)[..., 1:], gates[..., 1:])
    with pytest.raises(ValueError, match="`router='entropy'` needs S_q"):
        router("default", some_context(), None)


def test_entropy_router_keeps_the_top_k_forget_experts():
    z = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    gates = gate(z, torch.tensor([True]), 0.8, 0.01, 2, retain_competes=False)
    expected = torch.zeros(5)
    expected[0], expected[[2, 4]] = 1.0, (torch.tensor([4.0, 3.0]) / 0.8).softmax(-1)
    torch.testing.assert_close(gates[0], expected)


def test_entropy_router_of_format_1_has_the_retain_expert_in_its_softmax():
    router, entropy = make_router(router="entropy", format_version=1), torch.rand(2, 5)
    linear = router.alter_router["default"]
    assert linear.weight.shape == (3, 1)
    gates = router("default", some_context(), entropy)
    torch.testing.assert_close(gates, gate(entropy[..., None] * linear.weight.T[0], None, 0.8, 0.01, 3))
    assert torch.equal(router.config["default"].routing.competing(gates), gates)


def test_unmeasured_threshold_is_named():
    router = make_router(entropy_quantile=0.3)
    with pytest.raises(ValueError, match="`entropy_threshold` is not known yet"):
        router("default", some_context(), torch.rand(2, 5))


def test_router_is_frozen_and_starts_at_zero():
    router = AlterRouter(nn.Linear(2, 2))
    router.update_layer("default", 4, AlterConfig(num_forget_experts=2))
    assert not any(parameter.requires_grad or parameter.any() for parameter in router.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in router.parameters())
