# SPDX-License-Identifier: Apache-2.0
"""The moving average is the loop over its definition, in any pieces and whatever stands beside a token."""

from __future__ import annotations

import pytest
import torch

from alter_peft.tuner.moving_average import CHUNK, Context, moving_average


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


@pytest.mark.parametrize("past", [False, True], ids=["start", "going on"])
def test_each_text_of_a_packed_row_stands_alone(past):
    """Texts shorter and longer than a chunk, with padding between them."""
    lengths = [3, 1, 2 * CHUNK + 5, 40, CHUNK]
    hidden, valid = padded(sum(lengths))
    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(len(hidden), -1)
    before = None
    if past:
        before = Context(*(part[:, -1:] for part in moving_average(*padded(9), 8.0)))
    found = moving_average(hidden, valid, 8.0, before, text)
    pieces = zip(hidden.split(lengths, dim=1), valid.split(lengths, dim=1), strict=True)
    alone = [moving_average(*piece, 8.0, None if row else before) for row, piece in enumerate(pieces)]
    for name in Context._fields:
        expected = torch.cat([getattr(piece, name) for piece in alone], dim=1)
        torch.testing.assert_close(getattr(found, name), expected, atol=2e-6, rtol=1e-5)


def test_one_text_a_row_is_as_without_its_number():
    hidden, valid = padded(CHUNK + 9)
    expected = moving_average(hidden, valid, 8.0)
    found = moving_average(hidden, valid, 8.0, text=torch.zeros(valid.shape, dtype=torch.long))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_nothing(dtype):
    hidden, valid = padded(CHUNK + 9)
    expected = moving_average(hidden, valid, 8.0)
    with torch.autocast("cpu", dtype=dtype):
        found = moving_average(hidden, valid, 8.0)
    assert all(map(torch.equal, found, expected))
