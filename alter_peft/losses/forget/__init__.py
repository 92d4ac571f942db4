# SPDX-License-Identifier: Apache-2.0
"""The first term of Eq. 8: ALTER's forget losses and the field's, of the same inputs, a file a family."""

from .ascent import gradient_ascent_loss
from .entry import ForgetBatch, ForgetLoss
from .hinge import inverted_hinge_loss
from .levels import level_loss, profile_loss
from .preference import npo_loss, simnpo_loss
from .registry import FORGET_LOSSES


__all__ = [
    "FORGET_LOSSES",
    "ForgetBatch",
    "ForgetLoss",
    "gradient_ascent_loss",
    "inverted_hinge_loss",
    "level_loss",
    "npo_loss",
    "profile_loss",
    "simnpo_loss",
]
