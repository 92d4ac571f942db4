# SPDX-License-Identifier: Apache-2.0
"""The terms of ALTER's objective, Eq. 8 of arXiv:2603.01792, and the field's in their place; torch alone.

Every loss is unreduced: which tokens or rows count, and what their sum is divided by, is the trainer's.
"""

from .forget import (
    FORGET_LOSSES,
    ForgetBatch,
    ForgetLoss,
    gradient_ascent_loss,
    inverted_hinge_loss,
    level_loss,
    npo_loss,
    profile_loss,
    simnpo_loss,
    token_loss,
)
from .retain import RETAIN_LOSSES, RetainBatch, RetainLoss, cross_entropy_loss, kl_to_base_loss
from .scores import TokenScores, score_tokens
from .structural import StructuralInvariance, structural_invariance


__all__ = [
    "FORGET_LOSSES",
    "RETAIN_LOSSES",
    "ForgetBatch",
    "ForgetLoss",
    "RetainBatch",
    "RetainLoss",
    "StructuralInvariance",
    "TokenScores",
    "cross_entropy_loss",
    "gradient_ascent_loss",
    "inverted_hinge_loss",
    "kl_to_base_loss",
    "level_loss",
    "npo_loss",
    "profile_loss",
    "score_tokens",
    "simnpo_loss",
    "structural_invariance",
    "token_loss",
]
