# SPDX-License-Identifier: Apache-2.0
"""Attacks on an unlearned model by name. What one gives counts beyond what it gives on an oracle, attacked alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.scores import Key, Score, Scores
from alter_peft.options import check_known
from alter_peft.words import counted

from .asking_otherwise import ASKING_OTHERWISE
from .attack import LEARNING_RATE, Attack, Rows
from .membership import MEMBERSHIP
from .quantization import MERGED_QUANTIZATION, QUANTIZATION
from .relearning import RELEARNING
from .sampling import SAMPLING
from .switching_off import SWITCHING_OFF


__all__ = ["ATTACKS", "LEARNING_RATE", "Attack", "Attacked", "Rows", "attack", "check_rows", "control"]

ATTACKS: dict[str, Attack] = {
    "asking_otherwise": ASKING_OTHERWISE,
    "sampling": SAMPLING,
    "membership": MEMBERSHIP,
    "switching_off": SWITCHING_OFF,
    "quantization": QUANTIZATION,
    "merged_quantization": MERGED_QUANTIZATION,
    "relearning": RELEARNING,
}


class Attacked(NamedTuple):
    """
    What the attacks gave.

    scores: each with the name of its attack.
    skipped: attack, or `"{attack}/{set}"` -> why it does not apply to this model or these rows.
    seconds: attack -> what it took.
    """

    scores: Scores
    skipped: dict[str, str]
    seconds: dict[str, float]


def check_rows(rows: Rows, names: Sequence[str]) -> None:
    """Raise a `ValueError` if an attack does not exist, or the rows that it needs are missing."""
    check_known("names", names, ATTACKS)
    least = 2 if any("two rows" in ATTACKS[name].needs for name in names) else 1
    if names and len(rows.forget) < least:
        has = counted(len(rows.forget), "row")
        raise ValueError(f"`forget` has {has}, but the attacks {list(names)} need {least} at least.")
    unseen = [name for name in names if "holdout" in ATTACKS[name].needs]
    if unseen and not rows.holdout:
        raise ValueError(
            f"`holdout` has no rows, but the attacks {unseen} need some: like the forget set, and never trained on."
        )


def attack(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, names: Sequence[str] = tuple(ATTACKS)
) -> Attacked:
    """
    Attack a model in some ways, and leave it as it was.

    The control is the same call on a model that never saw the forget set: an attack succeeds by what it gives beyond
    that. In the precision of the context.

    Raises:
        ValueError: an attack that does not exist, or whose rows are missing; nothing was computed then.
    """
    check_rows(rows, names)
    result = Attacked(Scores(), {}, {})
    for name in names:
        entry = ATTACKS[name]
        if "adapter" in entry.needs and not isinstance(model, PeftModel):
            result.skipped[name] = f"a plain model has no adapter, so {entry.plain}"
        else:
            result.skipped.update(entry.left_out(model, rows))
        if name in result.skipped:
            continue
        start, settings = time.time(), dict(rows.settings or {})
        if "holdout" not in entry.needs:
            settings.pop("holdout", None)
        result.scores.add(entry.run(model, tokenizer, rows._replace(settings=settings)))
        torch.clear_autocast_cache()  # which keeps the weights of copies that are gone
        result.seconds[name] = time.time() - start
    return result


def control(scores: Scores, key: Key) -> Score | None:
    """
    A score of an oracle, or of an attack that it has no adapter for what takes its place: of an adapter switched off
    its own scores on the forget set, and of a rounded merge those of its rounded weights.
    """
    if key in scores or key.attack not in ATTACKS:
        return scores.get(key)
    other = ATTACKS[key.attack].control(key)
    return None if other is None else scores.get(other)
