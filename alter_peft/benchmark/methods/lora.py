# SPDX-License-Identifier: Apache-2.0
"""Plain LoRA: with ALTER's losses, as controls of its adapter, and with the field's."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig

from alter_peft.trainer import UnlearnTrainer

from .field import FIELD
from .method import Method


def _lora(**options: Any) -> PeftConfig:
    own = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**own, **options})


# TOFU unlearns for 5 epochs; the learning rate is the pilot's, nothing else is tuned
LORA: dict[str, Any] = {
    "num_train_epochs": 5, "per_device_train_batch_size": 4, "learning_rate": 5e-4, "gradient_checkpointing": False,
    "lr_scheduler_type": "linear",
}  # fmt: skip
# ALTER's epochs and schedule, under which a loss that has targets stops at them; the rate is LORA's
TO_TARGETS: dict[str, Any] = {**LORA, "num_train_epochs": 30, "lr_scheduler_type": "constant"}

CONTROLS: dict[str, Method] = {
    "lora_soft_targets": Method(
        "plain LoRA with ALTER's default loss, targets and stopping, at the rate of the others: what the adapter "
        "and its router are worth",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "soft_targets"}, calibrates=True,
    ),
    "lora_level": Method(
        "`lora_soft_targets` with `forget_loss=\"level\"`",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "level"}, calibrates=True,
    ),
    "lora_profile": Method(
        "`lora_soft_targets` with `forget_loss=\"profile\"`",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "profile"}, calibrates=True,
    ),
}  # fmt: skip

LORA_METHODS: dict[str, Method] = {
    f"lora_{name}": Method(f"plain LoRA, {one.caption}", UnlearnTrainer, _lora, {**LORA, **one.options})
    for name, one in FIELD.items()
}
