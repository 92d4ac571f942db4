# SPDX-License-Identifier: Apache-2.0
"""Two-sided losses: log-probabilities come to those of text that was never seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import TokenScores


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
