# SPDX-License-Identifier: Apache-2.0
"""All weights: for a model that is small enough to be saved whole for each method."""

from __future__ import annotations

from typing import Any

from alter_peft.trainer import UnlearnTrainer

from .field import FIELD
from .lora import LORA
from .method import Method


# the rate at which TOFU and open-unlearning train all weights; nothing is tuned
FULL: dict[str, Any] = {**LORA, "learning_rate": 1e-5}

FULL_METHODS: dict[str, Method] = {
    f"full_{name}": Method(f"all weights, {one.caption}", UnlearnTrainer, None, {**FULL, **one.options})
    for name, one in FIELD.items()
}
