# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent on the labels' cross-entropy."""

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
        cross-entropy on retain rows it is GradDiff (TOFU, arXiv:2401.06121).
    """
    return scores.log_prob
