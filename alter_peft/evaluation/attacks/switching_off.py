# SPDX-License-Identifier: Apache-2.0
"""Switching off: what an attacker finds who takes the adapter away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.copies import without_adapters
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.scores import Key, Score
from alter_peft.tuner.model import AlterModel

from .attack import ASKED, Attack, Rows


PLAIN = "its own scores on the forget set take the place of these"


def switching_off(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, metrics: Sequence[str] = ASKED
) -> list[Score]:
    """
    The set `"forget"` with the adapter off, and `"forget without {domain}"` with an expert of ALTER scaled to 0.

    Raises:
        ValueError: a plain model, which has nothing to switch off.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` cannot be attacked so: a plain model has no adapter, so {PLAIN}.")

    def measured(name: str) -> list[Score]:
        return measure(rows.asked(model, tokenizer, "switching_off", rows.forget, name), metrics)

    with without_adapters(model):
        scores = measured("forget")
    tuner: Any = model.base_model
    for domain in tuner.list_experts() if isinstance(tuner, AlterModel) else ():
        with tuner.experts({domain: 0.0}):
            scores += measured(f"forget without {domain}")
    return scores


SWITCHING_OFF = Attack(
    run=switching_off,
    caption="the adapter is switched off, as a whole and expert by expert",
    needs=("adapter",),
    packages=("rouge_score",),
    plain=PLAIN,
    control=lambda key: Key(key.set, key.metric) if key.set == "forget" else None,
)
