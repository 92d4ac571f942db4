# SPDX-License-Identifier: Apache-2.0
"""Token entropy, Eqs. 3 (Shannon) and 5 (Tsallis) of ALTER (arXiv:2603.01792), and the masks drawn from it.

Index convention: the entropy at position t is that of the distribution *at* position t, which predicts token t + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def max_tsallis_entropy(vocab_size: int, q: float) -> float:
    """Largest Tsallis entropy over a vocabulary, reached by the uniform distribution.

    max S_q = (1 - V^(1-q)) / (q - 1), and ln V at q = 1. A threshold at or above it selects no token.

    Args:
        vocab_size: V, the number of tokens, at least 2.
        q: the entropic index, above 0 and finite.

    Returns:
        The maximum, in nats at q = 1 and dimensionless otherwise.

    Raises:
        ValueError: if `q` is not a positive finite number, or `vocab_size` is below 2.
    """
    _check_q(q)
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; a distribution needs at least 2 outcomes.")
    log_size = math.log(vocab_size)
    return log_size if q == 1 else -math.expm1((1 - q) * log_size) / (q - 1)


def tsallis_entropy(logits: Tensor, q: float) -> Tensor:
    """Tsallis entropy of next-token distributions: Eq. 5, and at q = 1 Shannon's, Eq. 3.

    S_q(p) = (1 - sum_i p_i^q) / (q - 1) with p = softmax(logits), and -sum_i p_i ln p_i at q = 1. With d = |q - 1| and
    m = min(q, 1) it is evaluated as -sum_i p_i^m expm1(d ln p_i) / d, which is the same number for every q, loses no
    digits near q = 1, and has a finite gradient in the logits at p_i = 0 also for q < 1.

    Args:
        logits: unnormalised log-probabilities, shape (..., V); -inf is an outcome of probability 0.
        q: the entropic index, above 0 and finite.

    Returns:
        S_q, shape (...), in float32, or float64 for float64 logits; in nats at q = 1 and dimensionless otherwise.

    Raises:
        ValueError: if `q` is not a positive finite number.

    References:
        Tsallis, "Possible generalization of Boltzmann-Gibbs statistics", J. Stat. Phys. 52, 1988.
    """
    _check_q(q)
    log_p = log_probabilities(logits)
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 * -inf is NaN, 0 * min is 0
    if q == 1:
        return -(log_p.exp() * log_p).sum(-1)
    distance = abs(q - 1)
    return -((min(q, 1.0) * log_p).exp() * (distance * log_p).expm1()).sum(-1) / distance


def chunked_tsallis_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], q: float, chunk_size: int = 256
) -> Tensor:
    """Tsallis entropy (Eq. 5) from hidden states, never holding the logits of more than one chunk of rows.

    Args:
        hidden: final hidden states, shape (n, k); n may be 0.
        head: maps hidden states (c, k) to logits (c, V).
        q: the entropic index, see [`tsallis_entropy`].
        chunk_size: the most rows given to `head` at once; peak memory is a few (chunk_size, V) float32 tensors, in
            backward too.

    Returns:
        S_q, shape (n,).

    Raises:
        ValueError: if `q` is not a positive finite number, or `chunk_size` is below 1.
    """
    return map_row_chunks(lambda rows: tsallis_entropy(head(rows), q), chunk_size, hidden)


def entropy_quantile(entropy: Tensor, valid: Tensor, quantile: float) -> float:
    """Threshold that leaves a given fraction of the valid tokens at or below it.

    The ceil(quantile * n)-th smallest of the n valid entropies, hence one of them: at least the fraction `quantile`
    lies at or below it, and more only by the tokens tied with it. Unlike `torch.quantile` it has no size limit.

    Args:
        entropy: S_q of each token, any shape.
        valid: which tokens count, boolean, the same shape.
        quantile: the fraction of valid tokens that are to be low-entropy, strictly between 0 and 1.

    Returns:
        The threshold, in the units of `entropy`.

    Raises:
        ValueError: if `quantile` is outside (0, 1), no token is valid, or `valid` is not a boolean tensor of
            `entropy`'s shape.
    """
    _check_valid(entropy, valid)
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}; it must lie strictly between 0 and 1.")
    values = entropy[valid]
    if values.numel() == 0:
        raise ValueError("No token is valid, so there is no quantile; check the labels and the attention mask.")
    rank = max(1, math.ceil(quantile * values.numel() - 1e-6))  # 0.07 * 100 is 7.000000000000001
    return float(values.kthvalue(rank).values)


def entropy_masks(entropy: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Partition of the valid tokens by entropy; the paper gives the masks no number.

    high = {t valid: S_q(x_t) > threshold}, low = the valid tokens that are not high.

    Args:
        entropy: S_q(x_t), any shape.
        valid: which tokens count, boolean, the same shape.
        threshold: in the units of `entropy`; a token that equals it is low.

    Returns:
        The masks (low, high), boolean, of the same shape: disjoint, with union `valid`.

    Raises:
        ValueError: if `valid` is not a boolean tensor of `entropy`'s shape.
    """
    _check_valid(entropy, valid)
    above = entropy > threshold
    return valid & ~above, valid & above


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or in float64 for float64 logits."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum_v q(v) (ln q(v) - ln p(v)) in nats, (...), of log-probabilities (..., V)."""
    floor = torch.finfo(log_p.dtype).min  # so that two outcomes of probability 0 differ by 0, not by NaN
    return (log_q.exp() * (log_q.clamp(min=floor) - log_p.clamp(min=floor))).sum(-1)


def map_row_chunks(function: Callable[..., Tensor], chunk_size: int, *rows: Tensor) -> Tensor:
    """Concatenate `function` over successive chunks of rows, recomputing each of several chunks in backward.

    What `function` makes inside is freed after each chunk, so it never exists for more than `chunk_size` rows at once:
    chunks are checkpointed, which without gradients is a plain call. A single one is kept for backward, which is
    faster. Zero rows are one empty chunk, so that the result keeps its dtype and its graph.

    Args:
        function: maps tensors of c rows each to one tensor of c rows; deterministic up to torch's random state.
        chunk_size: the largest c.
        rows: tensors that share their first dimension, n.

    Returns:
        The outputs of `function`, concatenated: n rows.

    Raises:
        ValueError: if `chunk_size` is below 1, or the tensors differ in their number of rows.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
    lengths = [tensor.shape[0] for tensor in rows]
    if len(set(lengths)) != 1:
        raise ValueError(f"Row counts are {lengths}; they must be the same.")
    chunks = list(zip(*(torch.split(tensor, chunk_size) for tensor in rows), strict=True))
    if len(chunks) == 1:
        return function(*chunks[0])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def _check_q(q: float) -> None:
    if not 0 < q < math.inf:
        raise ValueError(f"q is {q}; it must be a positive finite number.")


def _check_valid(entropy: Tensor, valid: Tensor) -> None:
    if valid.dtype != torch.bool or valid.shape != entropy.shape:
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}; it must be torch.bool of entropy's shape "
            f"{tuple(entropy.shape)}."
        )
