# SPDX-License-Identifier: Apache-2.0
"""ALTER, its ablations, and other losses on its adapter."""

from __future__ import annotations

from typing import Any

from alter_peft.trainer import AlterUnlearnTrainer
from alter_peft.tuner import AlterConfig

from .field import FIELD
from .method import Method


def _static(**options: Any) -> AlterConfig:
    return AlterConfig(**{"router": "static", **options})


PAPERS_RATE = {"learning_rate": 1e-3}  # the package's own is for losses with token targets

ALTER: dict[str, Method] = {
    "alter": Method(
        "this package's defaults: context router, `forget_loss=\"soft_targets\"`, the retain expert at rest",
        AlterUnlearnTrainer, AlterConfig, stacks=True, calibrates=True,
    ),
    "alter_reference": Method(
        "`alter` with the model before the teaching as `reference_model`, which says what each token comes to",
        AlterUnlearnTrainer, AlterConfig, stacks=True, calibrates=True, refers=True,
    ),
    "alter_level": Method(
        "`alter` with `forget_loss=\"level\"`: a forget row's mean comes to the level of unseen rows, not each token",
        AlterUnlearnTrainer, AlterConfig, {**PAPERS_RATE, "forget_loss": "level"}, stacks=True, calibrates=True,
    ),
    "alter_profile": Method(
        "`alter` with `forget_loss=\"profile\"`: every token of a forget row comes to the rank of an unseen row's, "
        "not the row's mean alone",
        AlterUnlearnTrainer, AlterConfig, {**PAPERS_RATE, "forget_loss": "profile"}, stacks=True, calibrates=True,
    ),
    "alter_paper": Method(
        "`alter` with the paper's loss as printed (`forget_loss=\"ihl\"`), three epochs, no level: what it comes to "
        "by itself",
        AlterUnlearnTrainer, AlterConfig,
        {**PAPERS_RATE, "forget_loss": "ihl", "retain_weight": 1.0, "num_train_epochs": 3},
        stacks=True, calibrates=True,
    ),
    "alter_npo": Method(
        "ALTER's router and isolation with NPO and cross-entropy on retain rows, for `lora_npo`'s epochs and "
        "schedule: what the loss and its calibration are worth",
        AlterUnlearnTrainer, AlterConfig,
        {
            **PAPERS_RATE, "forget_loss": "npo", "retain_weight": 1.0, "num_train_epochs": 5,
            "lr_scheduler_type": "linear",
        },
        stacks=True,
    ),
    "asymlora": Method(
        "`alter` with `router=\"static\"`: all text sees all experts (AsymLoRA, Eqs. 2 and 6)",
        AlterUnlearnTrainer, _static, {**PAPERS_RATE, "retain_weight": 1.0}, stacks=True, calibrates=True,
    ),
}  # fmt: skip

# the field's losses on ALTER's adapter, for the epochs and the schedule that they have on plain LoRA
ALTER_FIELD: dict[str, Method] = {
    f"alter_{name}": Method(
        f"ALTER's router and isolation, {one.caption}", AlterUnlearnTrainer, AlterConfig,
        {**PAPERS_RATE, "num_train_epochs": 5, "lr_scheduler_type": "linear", "retain_weight": 1.0, **one.options},
        stacks=True,
    )
    for name, one in FIELD.items() if one.of_tokens and f"alter_{name}" not in ALTER
}  # fmt: skip
