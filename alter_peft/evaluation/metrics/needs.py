# SPDX-License-Identifier: Apache-2.0
"""What metrics need of a model, and what is wrong where it is not there."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from alter_peft.evaluation.answers import routes_tokens
from alter_peft.tuner.config import AlterConfig


def alter_config(model: Any) -> AlterConfig | None:
    """Of the first active adapter, if it is one of ALTER."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapters[0]]
    return config if isinstance(config, AlterConfig) else None


def lacking(need: str, model: Any, judge: Any) -> str | None:
    """What is wrong where `"router"`, `"threshold"` or `"judge"` is needed; `None` if the model has it."""
    if need == "router" and not routes_tokens(model):
        return "the model has no adapter that routes tokens. Leave it out for this model."
    if need == "threshold":
        config = alter_config(model)
        if config is None:
            return "the model has no ALTER adapter. Leave it out for this model."
        if config.entropy_threshold is None:
            return (
                "`entropy_threshold` is not known yet: with `entropy_quantile` it is measured by the trainer. Train "
                "the adapter first or set `entropy_threshold`."
            )
    if need == "judge" and judge is None and not isinstance(model, PeftModel):
        return (
            f"the model is a {type(model).__name__} without adapters, which can't be its own judge. Give another "
            "model as `judge`."
        )
    return None
