# SPDX-License-Identifier: Apache-2.0
"""The terms of ALTER's objective, Eq. 8 of arXiv:2603.01792, and the field's in their place; torch alone.

Every loss is unreduced: which tokens or rows count, and what their sum is divided by, is the trainer's.
"""

from .forget import (
    FORGET_LOSSES,
    ForgetBatch,
    ForgetLoss,
    Inside,
    dpo_loss,
    generic_labels,
    gradient_ascent_loss,
    inverted_hinge_loss,
    level_loss,
    novice_labels,
    npo_loss,
    other_label_loss,
    profile_loss,
    simnpo_loss,
    soft_target_loss,
    steering_loss,
    token_loss,
    undial_loss,
    weighted_gradient_ascent_loss,
)
from .retain import (
    RETAIN_LOSSES,
    RetainBatch,
    RetainLoss,
    activation_loss,
    cross_entropy_loss,
    kl_to_base_loss,
)
from .scores import TokenScores, score_tokens, score_tokens_and_others
from .structural import StructuralInvariance, exact_structural_invariance, structural_invariance


__all__ = [
    "FORGET_LOSSES",
    "RETAIN_LOSSES",
    "ForgetBatch",
    "ForgetLoss",
    "Inside",
    "RetainBatch",
    "RetainLoss",
    "StructuralInvariance",
    "TokenScores",
    "activation_loss",
    "cross_entropy_loss",
    "dpo_loss",
    "exact_structural_invariance",
    "generic_labels",
    "gradient_ascent_loss",
    "inverted_hinge_loss",
    "kl_to_base_loss",
    "level_loss",
    "novice_labels",
    "npo_loss",
    "other_label_loss",
    "profile_loss",
    "score_tokens",
    "score_tokens_and_others",
    "simnpo_loss",
    "soft_target_loss",
    "steering_loss",
    "structural_invariance",
    "token_loss",
    "undial_loss",
    "weighted_gradient_ascent_loss",
]
