# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent on the labels' cross-entropy, plain and weighted."""

from __future__ import annotations

from torch import Tensor

from ..scores import TokenScores


def gradient_ascent_loss(scores: TokenScores) -> Tensor:
    """
    Gradient ascent on the labels' cross-entropy: ln p(x_t), which has no point of rest.

    Args:
        scores: see [`TokenScores`].

    Returns:
        The loss of each token in nats, (n,).

    References:
        Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv:2210.01504. With
        cross-entropy on retain rows it is GradDiff, with KL minimisation KL-min (TOFU, arXiv:2401.06121).
    """
    return scores.log_prob


def weighted_gradient_ascent_loss(scores: TokenScores, beta: float = 1.0) -> Tensor:
    """
    Weighted gradient ascent (WGA): p(x_t)^beta ln p(x_t), the weight without a gradient of its own.

    Its gradient in a label's logit is p^beta (1 - p): it fades as the label becomes unlikely.

    Args:
        scores: see [`TokenScores`].
        beta: alpha of the paper, named as in open-unlearning, whose default is 1; 0 is gradient ascent.

    Returns:
        The loss of each token in nats, (n,).

    References:
        Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", arXiv:2502.19301.
    """
    return (beta * scores.log_prob).exp().detach() * scores.log_prob
