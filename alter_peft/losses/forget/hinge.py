# SPDX-License-Identifier: Apache-2.0
"""Losses that push a label below its strongest rival."""

from __future__ import annotations

from torch import Tensor

from ..scores import TokenScores


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
