# SPDX-License-Identifier: Apache-2.0
"""Which experts a gated adapter sends the tokens of a set to."""

from __future__ import annotations

from torch import Tensor

from alter_peft.evaluation.model_on_set import ModelOnSet

from .metric import Metric
from .needs import alter_config


def expert_usage(asked: ModelOnSet) -> dict[str, list[Tensor]]:
    """Of each `"expert_{d}"`, 0 being the retain expert, which tokens of the answers are sent to it."""
    config, routes = alter_config(asked.model), asked.scores.routes
    assert config is not None
    return {f"expert_{d}": [row == d for row in routes] for d in range(1 + (config.num_forget_experts or 1))}


EXPERT_USAGE = Metric(
    caption="share of the answers' tokens that expert d takes, 0 being the retain expert",
    tokens=expert_usage,
    needs=("router",),
    is_guard=True,
)
ASTRAY = Metric(
    caption="share of the tokens sent to the retain expert, of text to be forgotten, or to a forget expert, of other",
    rows=lambda asked: asked.scores.astray(asked.is_forget),
    needs=("router",),
    is_guard=True,
)
