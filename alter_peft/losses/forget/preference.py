# SPDX-License-Identifier: Apache-2.0
"""Losses of a preference: against the forget rows' answers, alone or beside others that are preferred."""

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
        beta, delta: named as in open-unlearning, whose defaults these are; the paper's gamma is beta delta. The best
            that the literature found by tuning on TOFU are beta 3.5 and delta 1.

    Returns:
        The loss of each row, (R,).

    References:
        Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        arXiv:2410.07163.
    """
    return -2 / beta * F.logsigmoid(-beta * log_prob / sizes - beta * delta)


def dpo_loss(
    log_prob: Tensor, reference: Tensor, alternate: Tensor, alternate_reference: Tensor, beta: float = 0.1
) -> Tensor:
    """
    Direct preference optimisation: -2/beta ln sigmoid(beta (ln(p(a) / p_ref(a)) - ln(p(y) / p_ref(y)))).

    y is a forget row's answer and a the alternate one, which is preferred. The factor 2/beta is open-unlearning's,
    which makes it NPO where the alternate answer stays as likely as it was.

    Args:
        log_prob: ln p(y) of each row, (R,).
        reference: ln p_ref(y), the same by the model before the training, (R,).
        alternate: ln p(a), (R,).
        alternate_reference: ln p_ref(a), (R,).
        beta: inverse temperature; 0.1 in TOFU and AltPO.

    Returns:
        The loss of each row, (R,).

    References:
        Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290. With refusals as alternate answers it is
        IdkDPO (Zhang et al., arXiv:2404.05868, on TOFU), with plausible other facts AltPO (Mekala et al., "Alternate
        Preference Optimization", arXiv:2409.13474).
    """
    return -2 / beta * F.logsigmoid(beta * ((alternate - alternate_reference) - (log_prob - reference)))
