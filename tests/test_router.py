# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from alter_peft import AlterConfig
from alter_peft.tuner.moving_average import CHUNK, Context, moving_average
from alter_peft.tuner.router import gate
from alter_peft.tuner.token_router import AlterRouter


def average_by_loop(hidden: torch.Tensor, valid: torch.Tensor, half_life: float) -> torch.Tensor:
    """c_t in float64, one token after the other: what `moving_average` has to equal."""
    decay = 0.5 ** (1 / half_life)
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for row in range(hidden.shape[0]):
        total, weight, seen = torch.zeros(hidden.shape[2], dtype=torch.float64), 0.0, 0
        for t in range(hidden.shape[1]):
            if valid[row, t]:
                seen += 1
                state = hidden[row, t].double()
                total, weight = decay * total, decay * weight
                if seen > 1:
                    total, weight = total + state / state.norm(), weight + 1.0
            result[row, t] = total / weight if weight else total
    return result


def padded(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows without padding, with left, with right padding, with holes, and with padding alone."""
    torch.manual_seed(0)
    valid = torch.ones(5, length, dtype=torch.bool)
    valid[1, : length // 3] = False
    valid[2, -length // 3 :] = False
    valid[3] = torch.rand(length) > 0.5
    valid[4] = False
    return torch.randn(5, length, 7) * 3 + 1, valid


@pytest.mark.parametrize("half_life", [0.5, 8.0, 1000.0])
@pytest.mark.parametrize("length", [1, 2, 20, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
def test_moving_average_is_the_loop(length, half_life):
    hidden, valid = padded(length)
    average = moving_average(hidden, valid, half_life)
    torch.testing.assert_close(
        average.average().double(), average_by_loop(hidden, valid, half_life), atol=2e-6, rtol=1e-5
    )
    assert torch.equal(average.count, valid.cumsum(dim=1).float())
    assert all(part.dtype == torch.float32 for part in average)


def test_first_token_is_left_out_and_the_second_stands_alone():
    hidden, valid = torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    average = moving_average(hidden, valid, 8.0).average()
    assert torch.equal(average[0, 0], torch.zeros(4))
    torch.testing.assert_close(average[0, 1], hidden[0, 1] / hidden[0, 1].norm())


@pytest.mark.parametrize("pad", [1, 5, CHUNK])
def test_padding_on_either_side_changes_nothing(pad):
    hidden = torch.randn(1, 9, 6)
    expected = moving_average(hidden, torch.ones(1, 9, dtype=torch.bool), 4.0).average()
    noise, off = torch.randn(1, pad, 6) * 100, torch.zeros(1, pad, dtype=torch.bool)
    on = torch.ones(1, 9, dtype=torch.bool)
    left = moving_average(torch.cat([noise, hidden], 1), torch.cat([off, on], 1), 4.0).average()
    right = moving_average(torch.cat([hidden, noise], 1), torch.cat([on, off], 1), 4.0).average()
    torch.testing.assert_close(left[:, pad:], expected)
    torch.testing.assert_close(right[:, :9], expected)


def test_later_tokens_and_other_rows_change_nothing():
    hidden, valid = torch.randn(3, 12, 6), torch.ones(3, 12, dtype=torch.bool)
    expected = moving_average(hidden, valid, 4.0).average()
    other = hidden.clone()
    other[0, 8:], other[1:] = 9.0, -1.0
    found = moving_average(other, valid, 4.0).average()
    assert torch.equal(found[0, :8], expected[0, :8])
    assert not torch.allclose(found[0, 8:], expected[0, 8:])


@pytest.mark.parametrize("cuts", [[1] * 40, [20, 20], [1, 38, 1], [CHUNK + 3, 1, 1, CHUNK]])
def test_in_pieces_equals_one_pass(cuts):
    hidden, valid = padded(sum(cuts))
    whole = moving_average(hidden, valid, 8.0)
    past, pieces = None, []
    for states, mask in zip(hidden.split(cuts, dim=1), valid.split(cuts, dim=1), strict=True):
        piece = moving_average(states, mask, 8.0, past)
        past = Context(*(part[:, -1:] for part in piece))
        pieces.append(piece)
    for name in Context._fields:
        torch.testing.assert_close(
            torch.cat([getattr(piece, name) for piece in pieces], dim=1), getattr(whole, name), atol=2e-6, rtol=1e-5
        )


def test_half_life_is_in_tokens():
    hidden = torch.eye(2)[torch.tensor([0, 0, 1, 1, 1, 1])].unsqueeze(0)  # one used token, then four of the other
    total = moving_average(hidden, torch.ones(1, 6, dtype=torch.bool), half_life=4.0).sum[0, -1]
    torch.testing.assert_close(total[0], torch.tensor(0.5))


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


def test_entropy_router_is_the_letter_of_eq_7():
    router, entropy = make_router(router="entropy"), torch.rand(2, 5)
    linear = router.alter_router["default"]
    assert linear.bias is None and linear.weight.shape == (3, 1)
    torch.testing.assert_close(
        router.logits("default", some_context(), entropy), entropy[..., None] * linear.weight.T[0]
    )
    with pytest.raises(ValueError, match="`router='entropy'` needs S_q"):
        router("default", some_context(), None)


def test_unmeasured_threshold_is_named():
    router = make_router(entropy_quantile=0.3)
    with pytest.raises(ValueError, match="`entropy_threshold` is not known yet"):
        router("default", some_context(), torch.rand(2, 5))


def test_router_is_frozen_and_starts_at_zero():
    router = AlterRouter(nn.Linear(2, 2))
    router.update_layer("default", 4, AlterConfig(num_forget_experts=2))
    assert not any(parameter.requires_grad or parameter.any() for parameter in router.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in router.parameters())
