# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from alter_peft.entropy import (
    chunked_tsallis_entropy,
    entropy_masks,
    entropy_quantile,
    map_row_chunks,
    max_tsallis_entropy,
    tsallis_entropy,
)


pytestmark = pytest.mark.filterwarnings("error")

INDICES = (0.5, 0.9999999, 1, 1.5, 2, 3)


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (2, 0.625),  # 1 - (1/4 + 1/16 + 1/16) = 10/16
        (3, 0.421875),  # (1 - (1/8 + 1/64 + 1/64)) / 2 = (54/64) / 2
        (0.5, 2 * (math.sqrt(0.5) + 0.5 + 0.5 - 1)),  # (1 - (sqrt 1/2 + 1/2 + 1/2)) / (-1/2)
        (1.5, 2 * (1 - 0.5**1.5 - 0.125 - 0.125)),  # (1 - (2^-1.5 + 1/8 + 1/8)) / (1/2)
        (1, 1.5 * math.log(2)),  # 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 4
    ],
)
def test_entropy_of_a_half_and_two_quarters_by_hand(q: float, expected: float) -> None:
    entropy = tsallis_entropy(logits_of(0.5, 0.25, 0.25), q)
    assert entropy.item() == pytest.approx(expected, rel=1e-14)


def test_entropy_does_not_depend_on_the_logits_offset_and_keeps_leading_dimensions() -> None:
    logits = random_logits(2, 3, 7)
    entropy = tsallis_entropy(logits, 1.5)
    assert entropy.shape == (2, 3)
    torch.testing.assert_close(tsallis_entropy(logits + 40, 1.5), entropy)
    torch.testing.assert_close(tsallis_entropy(logits[1, 2], 1.5), entropy[1, 2])


@pytest.mark.parametrize("side", [-1, 1])
def test_entropy_tends_to_shannon_from_both_sides(side: int) -> None:
    logits = random_logits(20, 50)
    shannon = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(tsallis_entropy(logits, 1), shannon)
    errors = [(tsallis_entropy(logits, 1 + side * d) - shannon).abs().max().item() for d in (1e-2, 1e-5, 1e-8, 1e-14)]
    for error, distance in zip(errors, (1e-2, 1e-5, 1e-8, 1e-14), strict=True):
        assert error <= 20 * distance + 1e-13  # S_q - S_1 = (1 - q) / 2 * sum p ln^2 p + ..., and that sum is < 40
    assert errors[0] > 1e-3


@pytest.mark.parametrize("q", INDICES)
@pytest.mark.parametrize("vocab_size", [2, 11, 49152])
def test_uniform_reaches_the_maximum_and_nothing_exceeds_it(q: float, vocab_size: int) -> None:
    maximum = max_tsallis_entropy(vocab_size, q)
    uniform = torch.full((vocab_size,), 5.0, dtype=torch.float64)
    assert tsallis_entropy(uniform, q).item() == pytest.approx(maximum, rel=1e-12)
    assert (tsallis_entropy(random_logits(4, vocab_size), q) < maximum).all()


def test_maximum_by_hand_and_at_its_limit() -> None:
    assert max_tsallis_entropy(4, 2) == pytest.approx(0.75)  # 1 - 1/4
    assert max_tsallis_entropy(4, 0.5) == pytest.approx(2.0)  # (1 - 2) / (-1/2)
    assert max_tsallis_entropy(4, 1) == pytest.approx(2 * math.log(2))
    for q in (1 - 1e-12, 1 + 1e-12):
        assert max_tsallis_entropy(49152, q) == pytest.approx(math.log(49152), rel=1e-10)


def test_threshold_1_2_is_reachable_up_to_q_1_834_in_a_vocabulary_of_49152() -> None:
    # At q = 1.5: (1 - 49152^-0.5) / 0.5 = 2 (1 - 1/221.70) = 1.99098.
    assert max_tsallis_entropy(49152, 1.5) == pytest.approx(1.99098, abs=1e-5)
    assert max_tsallis_entropy(49152, 1.833) > 1.2
    assert max_tsallis_entropy(49152, 1.834) < 1.2
    assert max_tsallis_entropy(49152, 3) < max_tsallis_entropy(49152, 2) < 1.2  # and it only falls from there


@pytest.mark.parametrize("q", INDICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_hot_is_zero(q: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-math.inf, 3.0, -math.inf], [-6e4, 0.0, -6e4]], dtype=dtype)
    entropy = tsallis_entropy(logits, q)
    assert torch.equal(entropy.abs(), torch.zeros_like(entropy))


@pytest.mark.parametrize("q", INDICES)
def test_flatter_distributions_have_more_entropy(q: float) -> None:
    logits = random_logits(50)
    entropy = tsallis_entropy(torch.stack([logits / t for t in (0.1, 0.5, 1, 2, 10)]), q)
    assert (entropy.diff() > 0).all()
    assert (entropy > 0).all()


def test_entropy_falls_as_q_grows() -> None:
    logits = random_logits(10, 50)
    entropy = torch.stack([tsallis_entropy(logits, q) for q in INDICES])
    assert (entropy.diff(dim=0) < 0).all()


@pytest.mark.parametrize("q", INDICES)
def test_gradient_matches_finite_differences(q: float) -> None:
    assert torch.autograd.gradcheck(lambda x: tsallis_entropy(x, q), random_logits(3, 6).requires_grad_())


@pytest.mark.parametrize("q", INDICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impossible", [-math.inf, -1e3])
def test_an_impossible_token_changes_neither_entropy_nor_gradient(
    q: float, dtype: torch.dtype, impossible: float
) -> None:
    possible = random_logits(4, 6, dtype=dtype).requires_grad_()
    padded = torch.cat([possible.detach(), torch.full((4, 2), impossible, dtype=dtype)], dim=-1).requires_grad_()
    entropy, entropy_padded = tsallis_entropy(possible, q), tsallis_entropy(padded, q)
    entropy.sum().backward()
    entropy_padded.sum().backward()
    torch.testing.assert_close(entropy_padded, entropy)
    torch.testing.assert_close(padded.grad[:, :6], possible.grad)
    assert (padded.grad[:, 6:].abs() < 1e-30).all()


@pytest.mark.parametrize("q", INDICES)
def test_low_precision_logits_are_evaluated_in_float32(q: float) -> None:
    logits = random_logits(5, 4000).to(torch.bfloat16)
    entropy = tsallis_entropy(logits, q)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.double(), tsallis_entropy(logits.double(), q), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("q", [0, -1, math.nan, math.inf])
def test_q_must_be_positive_and_finite(q: float) -> None:
    with pytest.raises(ValueError, match="q is"):
        tsallis_entropy(torch.zeros(2), q)
    with pytest.raises(ValueError, match="q is"):
        max_tsallis_entropy(10, q)


def test_a_vocabulary_has_two_tokens_or_more() -> None:
    with pytest.raises(ValueError, match="vocab_size is 1"):
        max_tsallis_entropy(1, 2)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunked_equals_unchunked_with_gradients(chunk_size: int) -> None:
    hidden, weight = random_logits(7, 4).requires_grad_(), random_logits(9, 4, seed=1).requires_grad_()
    whole = tsallis_entropy(hidden @ weight.T, 0.5)
    chunked = chunked_tsallis_entropy(hidden, lambda rows: rows @ weight.T, 0.5, chunk_size)
    torch.testing.assert_close(chunked, whole)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, -1], dtype=torch.float64)
    expected = torch.autograd.grad(signs @ whole, [hidden, weight])
    torch.testing.assert_close(torch.autograd.grad(signs @ chunked, [hidden, weight]), expected)


def test_head_never_sees_more_than_a_chunk_and_runs_once_without_gradients() -> None:
    rows_seen = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        rows_seen.append(rows.shape[0])
        return rows @ weight.T

    hidden, weight = random_logits(7, 4).requires_grad_(), random_logits(9, 4, seed=1)
    with torch.no_grad():
        assert not chunked_tsallis_entropy(hidden, head, 1.5, chunk_size=3).requires_grad
    assert rows_seen == [3, 3, 1]
    chunked_tsallis_entropy(hidden, head, 1.5, chunk_size=3).sum().backward()
    assert sorted(rows_seen[3:]) == [1, 1, 3, 3, 3, 3]  # once forward, once recomputed


@pytest.mark.parametrize(("rows", "calls"), [(3, 1), (4, 4)], ids=["one chunk", "two chunks"])
def test_a_single_chunk_is_not_made_twice(rows: int, calls: int) -> None:
    seen: list[int] = []

    def square(chunk: torch.Tensor) -> torch.Tensor:
        seen.append(len(chunk))
        return chunk.square()

    values = torch.arange(float(rows), requires_grad=True)
    map_row_chunks(square, 3, values).sum().backward()
    assert len(seen) == calls
    assert values.grad is not None and values.grad.tolist() == [2.0 * i for i in range(rows)]


def test_chunked_entropy_of_no_rows_is_empty_and_differentiable() -> None:
    hidden, weight = torch.empty(0, 4, requires_grad=True), torch.ones(9, 4)
    entropy = chunked_tsallis_entropy(hidden, lambda rows: rows @ weight.T, 1.5)
    assert entropy.shape == (0,)
    assert entropy.dtype == torch.float32
    entropy.sum().backward()
    assert hidden.grad is not None


def test_row_chunks_reject_a_bad_size_and_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="chunk_size is 0"):
        map_row_chunks(torch.neg, 0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        map_row_chunks(torch.add, 2, torch.zeros(3), torch.zeros(2))


def test_quantile_by_hand() -> None:
    # Valid values 1, 2, 3, 4, 5: the ceil(0.4 * 5) = 2nd is 2, the ceil(0.41 * 5) = 3rd is 3.
    entropy = torch.tensor([[5.0, 9.0, 1.0], [3.0, 2.0, 4.0]])
    valid = torch.tensor([[True, False, True], [True, True, True]])
    assert entropy_quantile(entropy, valid, 0.4) == 2.0
    assert entropy_quantile(entropy, valid, 0.41) == 3.0
    assert entropy_quantile(entropy, valid, 0.001) == 1.0
    assert entropy_quantile(entropy, valid, 0.999) == 5.0


@pytest.mark.parametrize("percent", range(1, 100))
def test_quantile_puts_exactly_that_fraction_in_the_low_mask(percent: int) -> None:
    entropy = torch.rand(300, generator=torch.Generator().manual_seed(percent))
    valid = torch.arange(300) % 3 == 0
    low, high = entropy_masks(entropy, valid, entropy_quantile(entropy, valid, percent / 100))
    assert (low.sum().item(), high.sum().item()) == (percent, 100 - percent)


def test_quantile_counts_ties_as_low() -> None:
    entropy = torch.tensor([0.0, 0.0, 0.0, 1.0])
    valid = torch.ones(4, dtype=torch.bool)
    low, _ = entropy_masks(entropy, valid, entropy_quantile(entropy, valid, 0.25))
    assert low.tolist() == [True, True, True, False]


def test_quantile_of_more_tokens_than_torch_quantile_takes() -> None:
    n = 2**24 + 4
    entropy = torch.arange(n, dtype=torch.int32)  # integers: float32 cannot tell them apart at this size
    assert entropy_quantile(entropy, torch.ones(n, dtype=torch.bool), 0.25) == n / 4 - 1


@pytest.mark.parametrize("quantile", [0, 1, -0.1, 1.5, math.nan])
def test_quantile_must_lie_inside_the_unit_interval(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile is"):
        entropy_quantile(torch.ones(3), torch.ones(3, dtype=torch.bool), quantile)


def test_quantile_needs_a_valid_token() -> None:
    with pytest.raises(ValueError, match="No token is valid"):
        entropy_quantile(torch.ones(3), torch.zeros(3, dtype=torch.bool), 0.5)


@pytest.mark.parametrize("valid", [torch.ones(2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.int64)])
def test_valid_must_be_boolean_and_of_the_same_shape(valid: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="valid is"):
        entropy_quantile(torch.ones(2, 3), valid, 0.5)
    with pytest.raises(ValueError, match="valid is"):
        entropy_masks(torch.ones(2, 3), valid, 0.5)


def test_masks_by_hand() -> None:
    entropy = torch.tensor([0.5, 1.2, 1.3, 2.0, 0.1])
    valid = torch.tensor([True, True, True, False, False])
    low, high = entropy_masks(entropy, valid, 1.25)
    assert low.tolist() == [True, True, False, False, False]
    assert high.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_masks_partition_the_valid_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(4, 30, generator=generator)
    entropy[0, :5] = torch.tensor([0.0, 0.5, math.nan, math.inf, -0.0])
    valid = torch.rand(4, 30, generator=generator) < 0.7
    low, high = entropy_masks(entropy, valid, 0.5)
    assert low.dtype == high.dtype == torch.bool
    assert torch.equal(low | high, valid)
    assert not (low & high).any()
    assert torch.equal(high, valid & (entropy > 0.5))


def test_a_token_at_the_threshold_is_low() -> None:
    low, high = entropy_masks(torch.tensor([1.5]), torch.tensor([True]), 1.5)
    assert low.item() and not high.item()
