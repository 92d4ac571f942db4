# SPDX-License-Identifier: Apache-2.0
"""Losses of a preference against the forget rows' answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def npo_loss(log_prob: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """
    Negative preference optimisation: -2/beta ln sigmoid(-beta ln(p / p_ref)).

    Args:
        log_prob: ln p of each row, (R,).
        reference: ln p_ref, the same by the model before the training, (R,).
        beta: inverse temperature; 0.1 is the paper's on TOFU. beta -> 0 is gradient ascent.

    Returns:
        The loss of each row, (R,).

    References:
        Zhang et al., "Negative Preference Optimization", arXiv:2404.05868.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_prob - reference))


def simnpo_loss(log_prob: Tensor, sizes: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """
    Negative preference optimisation without a reference: -2/beta ln sigmoid(-beta (ln p / |y| + delta)).

    Args:
        log_prob: ln p of each row, (R,).
        sizes: |y|, its tokens, (R,).
        beta, delta: named as in open-unlearning; the paper's gamma is beta delta.

    Returns:
        The loss of each row, (R,).

    References:
        Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        arXiv:2410.07163.
    """
    return -2 / beta * F.logsigmoid(-beta * log_prob / sizes - beta * delta)
