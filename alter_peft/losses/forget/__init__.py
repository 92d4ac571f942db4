# SPDX-License-Identifier: Apache-2.0
"""The first term of Eq. 8: ALTER's forget losses and the field's, of the same inputs, a file a family."""

from .activations import steering_loss
from .ascent import gradient_ascent_loss, weighted_gradient_ascent_loss
from .entry import ForgetBatch, ForgetLoss, Inside
from .hinge import inverted_hinge_loss
from .labels import generic_labels, novice_labels, other_label_loss, undial_loss
from .levels import level_loss, profile_loss
from .preference import dpo_loss, npo_loss, simnpo_loss
from .registry import FORGET_LOSSES
from .tokens import soft_target_loss, token_loss


__all__ = [
    "FORGET_LOSSES",
    "ForgetBatch",
    "ForgetLoss",
    "Inside",
    "dpo_loss",
    "generic_labels",
    "gradient_ascent_loss",
    "inverted_hinge_loss",
    "level_loss",
    "novice_labels",
    "npo_loss",
    "other_label_loss",
    "profile_loss",
    "simnpo_loss",
    "soft_target_loss",
    "steering_loss",
    "token_loss",
    "undial_loss",
    "weighted_gradient_ascent_loss",
]
