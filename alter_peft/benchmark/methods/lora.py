# SPDX-License-Identifier: Apache-2.0
"""Plain LoRA with the field's losses."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig

from alter_peft.trainer import UnlearnTrainer

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

LORA_METHODS: dict[str, Method] = {
    "lora_level": Method(
        "plain LoRA with ALTER's default loss, level and stopping, at the rate of the others: what the adapter "
        "and its router are worth",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "level"}, calibrates=True,
    ),
    "lora_profile": Method(
        "`lora_level` with `forget_loss=\"profile\"`",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "profile"}, calibrates=True,
    ),
    "lora_ihl": Method(
        "plain LoRA, inverted hinge loss on the forget rows plus cross-entropy on retain rows: LoKU's loss "
        "(2408.06621), without its FILA start",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "ihl"},
    ),
    "lora_ga": Method(
        "plain LoRA, gradient ascent plus cross-entropy on retain rows (GradDiff, 2401.06121)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "ga"},
    ),
    "lora_npo": Method(
        "plain LoRA, negative preference optimisation (NPO) plus cross-entropy on retain rows (2404.05868, beta 0.1)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "npo"},
    ),
    "lora_simnpo": Method(
        "plain LoRA, the form of NPO without a reference plus cross-entropy on retain rows (SimNPO, 2410.07163, "
        "beta 4.5, weight 0.125 and no margin, as in open-unlearning)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "simnpo"},
    ),
}  # fmt: skip
