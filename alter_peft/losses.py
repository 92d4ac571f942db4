# SPDX-License-Identifier: Apache-2.0
"""The terms of ALTER's objective: Eq. 8 of arXiv:2603.01792.

Every loss is per token, unreduced: which tokens count and what they are divided by is the caller's. Each is computed
from hidden states through the head in chunks of rows, so that no V-sized tensor exists for all tokens at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .entropy import log_probabilities, map_row_chunks


class TokenScores(NamedTuple):
    """What the losses need of each token's distribution, in nats.

    Attributes:
        log_prob: ln p(x_t), the label's log-probability, shape (n,).
        log_rival: ln max_{v != x_t} p(v), that of the most likely other token, shape (n,).
    """

    log_prob: Tensor
    log_rival: Tensor


def score_tokens(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk_size: int = 256
) -> TokenScores:
    """Log-probabilities of the labels and of their strongest rivals.

    Args:
        hidden: final hidden states at the scored positions, shape (n, k); n may be 0.
        head: maps hidden states (c, k) to logits (c, V), V at least 2.
        labels: x_t, the token that each position predicts, shape (n,), each in [0, V): drop ignored ones before.
        chunk_size: the most rows given to `head` at once, in forward and in backward's recomputation.

    Returns:
        The scores, in float32, or float64 for float64 logits.

    Raises:
        ValueError: if `hidden` and `labels` differ in length, or `chunk_size` is below 1.
    """

    def score(rows: Tensor, label: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        log_prob = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        top = log_p.topk(2, dim=-1)
        log_rival = torch.where(top.indices[:, 0] == label, top.values[:, 1], top.values[:, 0])
        return torch.stack([log_prob, log_rival], dim=-1)

    return TokenScores(*map_row_chunks(score, chunk_size, hidden, labels).unbind(-1))


def inverted_hinge_loss(scores: TokenScores, margin: float | None = None) -> Tensor:
    """Inverted hinge loss, L_IHL of Eq. 8: push the label below its strongest rival.

    1 + p(x_t) - max_{v != x_t} p(v), or with a margin m: max(0, p(x_t) - max_{v != x_t} p(v) + m).

    With p = p(x_t) and p_v the rival's probability, its gradient in the label's logit is p (1 - p + p_v), which
    vanishes as p -> 1: on a memorised token it starts slowly. Without a margin it is at rest only at p_v = 1; with one
    it is at rest once the rival leads by m.

    Args:
        scores: see [`score_tokens`].
        margin: m, a difference of probabilities; None for the paper's form.

    Returns:
        The loss of each token, shape (n,): in [0, 2] without a margin, in [0, 1 + m] with m >= 0.

    References:
        Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs" (LoKU), arXiv:2408.06621.
    """
    lead = scores.log_prob.exp() - scores.log_rival.exp()
    return 1 + lead if margin is None else (lead + margin).relu()


def level_loss(scores: TokenScores, rows: Tensor, targets: Tensor) -> Tensor:
    """Two-sided forget loss: bring a row's mean log-probability to the level of text that was never seen.

    huber(mean_{t in row} ln p(x_t) - target), linear beyond half a nat and quadratic within: the same number for each
    token of a row. Not in the paper, whose hinge has no such point of rest. Its gradient in a label's logit is
    proportional to 1 - p: tokens that anyone could predict keep their probability, as in a model that never saw the
    text, and those that carry the fact give way. It shrinks as the target comes near and turns round beyond it, so
    that an optimiser's momentum is called back.

    Args:
        scores: see [`score_tokens`].
        rows: the row of each token, shape (n,), integers below R.
        targets: the mean log-probability to reach, one a row, in nats, shape (R,).

    Returns:
        The loss of each token, shape (n,): in nats beyond half a nat from the target.
    """
    zeros = torch.zeros_like(targets, dtype=scores.log_prob.dtype)
    sums = zeros.index_add(0, rows, scores.log_prob)
    sizes = zeros.index_add(0, rows, torch.ones_like(scores.log_prob))
    means = sums / sizes.clamp(min=1)
    return F.smooth_l1_loss(means, targets.to(means.dtype), reduction="none", beta=0.5)[rows]


def profile_loss(scores: TokenScores, rows: Tensor, targets: Tensor) -> Tensor:
    """Two-sided forget loss: bring the log-probabilities of a row's tokens to those of a row never seen, rank by rank.

    huber(ln p(x_(i)) - target_(i)), with x_(i) the i-th least likely token of its row; linear beyond half a nat and
    quadratic within. Not in the paper. What [`level_loss`] does with the mean alone: a mean can also be reached by a
    few very unlikely tokens, while all others stay the model's first choice. Up to the Huber part its sum over a row
    is the row's length times the first Wasserstein distance between the two samples, which sorting solves.

    Args:
        scores: see [`score_tokens`].
        rows: the row of each token, shape (n,), integers.
        targets: the log-probabilities to reach, in nats, shape (n,): row after row in the order of their numbers, the
            least likely first within each.

    Returns:
        The loss of each token, shape (n,): in nats beyond half a nat from its target.

    Raises:
        ValueError: if `targets` are not as many as the tokens.
    """
    if len(targets) != len(scores.log_prob):
        raise ValueError(f"targets has {len(targets)} values for {len(scores.log_prob)} tokens; give one for each.")
    order = torch.argsort(scores.log_prob.detach(), stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    reached = scores.log_prob[order]
    loss = F.smooth_l1_loss(reached, targets.to(reached.dtype), reduction="none", beta=0.5)
    return torch.zeros_like(loss).index_copy(0, order, loss)


def cross_entropy_loss(scores: TokenScores) -> Tensor:
    """Cross-entropy of the labels, L_retain of Eq. 8: -ln p(x_t).

    Args:
        scores: see [`score_tokens`].

    Returns:
        The loss of each token in nats, shape (n,).
    """
    return -scores.log_prob


def kl_to_base_loss(
    hidden: Tensor, base_hidden: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int = 256
) -> Tensor:
    """Divergence of the adapted model from the base, an option for L_retain of Eq. 8.

    KL(p_base || p) = sum_v p_base(v) (ln p_base(v) - ln p(v)). No gradient flows into the base's side.

    Args:
        hidden: the adapted model's final hidden states, shape (n, k); n may be 0.
        base_hidden: the base model's, shape (n, k).
        head: maps hidden states (c, k) to logits (c, V), for both; it should be frozen.
        chunk_size: the most rows given to `head` at once, in forward and in backward's recomputation.

    Returns:
        The divergence of each token in nats, shape (n,), in float32, or float64 for float64 logits.

    Raises:
        ValueError: if the two differ in their number of rows, or `chunk_size` is below 1.
    """

    def divergence(rows: Tensor, base_rows: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        floor = torch.finfo(log_p.dtype).min  # so that two outcomes of probability 0 differ by 0, not by NaN
        log_p = log_p.clamp(min=floor)
        with torch.no_grad():
            log_base = log_probabilities(head(base_rows)).clamp(min=floor)
        return (log_base.exp() * (log_base - log_p)).sum(-1)

    return map_row_chunks(divergence, chunk_size, hidden, base_hidden)


class StructuralInvariance(NamedTuple):
    """The structural term and its gradient.

    Attributes:
        value: ||grad f||^2 over all shared tensors jointly, a scalar.
        gradients: the gradient of `value` in each shared tensor, to be added to its `.grad` with the term's weight.
    """

    value: Tensor
    gradients: list[Tensor]


def structural_invariance(
    signed_entropy: Callable[[], Tensor], shared: Sequence[Tensor], step: float = 1e-3
) -> StructuralInvariance:
    """Structural invariance, L_struct of Eq. 8, with its gradient, from first derivatives alone.

    For f(A) = sum_t eps_t S_q(x_t) over the high-entropy tokens, with independent signs eps_t = +-1 of mean 0, the
    value g.g with g = grad f(A) has expectation sum_t ||grad_A S_q(x_t)||^2: the cross terms cancel. Its gradient is
    2 H g, with H the Hessian of f, taken as a central difference along u = g / ||g||:

        2 H g = 2 ||g|| (grad f(A + h u) - grad f(A - h u)) / (2 h) + O(h^2),  h = step max(1, ||A||).

    Norms run over all shared tensors jointly, so `step` is the length of the displacement relative to that of A. The
    computation must resolve it: on a random six-layer transformer the default's relative error was 1e-4 in float32,
    where it is the best, but 1.4 under bfloat16 autocast, where rounding swallows it and 3e-2 was the best (0.07).

    Args:
        signed_entropy: recomputes f, a scalar, at the present values of `shared`: same data, same signs, no dropout.
            Called three times, or once where g = 0.
        shared: A of every adapted layer, leaf tensors that require gradients; those that f does not use get zeros.
            Displaced meanwhile, and restored bit for bit on return and on an error.
        step: relative length of the displacement, above 0.

    Returns:
        The value and its gradients. Nothing is accumulated into `.grad`, and no hook of DDP fires: over several
        processes the caller averages.

    Raises:
        ValueError: if `step` is not above 0, or `shared` is empty.
    """
    if not step > 0:
        raise ValueError(f"step is {step}; it must be above 0.")
    if not shared:
        raise ValueError("shared is empty; give at least one tensor.")
    gradient = _first_derivative(signed_entropy, shared)
    norm = _joint_norm(gradient)
    value = torch.tensor(norm**2, dtype=torch.promote_types(shared[0].dtype, torch.float32), device=shared[0].device)
    if norm == 0:
        return StructuralInvariance(value, gradient)
    length = step * max(1.0, _joint_norm(shared))
    displacement = [tensor * (length / norm) for tensor in gradient]
    ahead, behind = _derivatives_beside(signed_entropy, shared, displacement)
    return StructuralInvariance(value, [(a - b) * (norm / length) for a, b in zip(ahead, behind, strict=True)])


def _first_derivative(function: Callable[[], Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(), shared, allow_unused=True, materialize_grads=True))


def _derivatives_beside(
    function: Callable[[], Tensor], shared: Sequence[Tensor], displacement: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of `function` at `shared` plus and minus `displacement`; `shared` is restored."""
    # Through .data, which bumps no version: a graph of the main loss that holds A stays valid.
    origin = [tensor.detach().clone() for tensor in shared]
    try:
        derivatives = []
        for sign in (1, -1):
            for tensor, start, offset in zip(shared, origin, displacement, strict=True):
                tensor.data.copy_(start + sign * offset)
            derivatives.append(_first_derivative(function, shared))
    finally:
        for tensor, start in zip(shared, origin, strict=True):
            tensor.data.copy_(start)
    return derivatives[0], derivatives[1]


def _joint_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries of all tensors, in float32 at least."""
    norms = (torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    return math.hypot(*(norm.item() for norm in norms))
