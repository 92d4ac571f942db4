# SPDX-License-Identifier: Apache-2.0
"""What was measured, as typed rows: one number of one set, and all that is needed to know what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, NamedTuple


class Key(NamedTuple):
    """
    What a score is of; two scores with one key are the same quantity of two models.

    Attributes:
        set: of questions, such as `"forget"`, or a task of multiple choice.
        metric: a name of `METRICS`.
        attack: under which the model was asked, a name of `ATTACKS`, or `None`: as it is.
        step: of relearning, or how many requests had been made; `None` where there are no steps.
    """

    set: str
    metric: str
    attack: str | None = None
    step: float | None = None

    def __str__(self) -> str:
        """As tables and messages print it: `relearning/forget, step 20/probability`."""
        step = "" if self.step is None else f", step {self.step:g}"
        return "/".join(part for part in (self.attack, f"{self.set}{step}", self.metric) if part)


# how the rows become the value -> what each row adds to it, a mean over rows; `None` where no row does by itself
AVERAGES: dict[str, Callable[[float], float] | None] = {
    "mean": lambda row: row,
    "near_one": lambda row: min(row, 1 / max(row, 1e-10)),  # TOFU's truth ratio on forget sets
    "truthfulness": lambda row: max(1 - row, 0.0),  # and on all others
    "other": None,
}


@dataclass(frozen=True)
class Score:
    """
    One metric of one set of questions.

    Attributes:
        set, metric, attack, step: see [`Key`].
        value: what is reported.
        rows: one number a question, in the order of the set; fewer where only some were answered, none for a score
            that is computed from other scores.
        average: how the rows become the value, a name of `AVERAGES`.
        settings: what the value depends on beside the model, by name: how many questions were answered in full, with
            how many tokens, in a chat or not, of which file, ... Scores of other settings are not comparable.
    """

    set: str
    metric: str
    value: float
    rows: Sequence[float] = field(default_factory=list)
    average: str = "mean"
    attack: str | None = None
    step: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What the score is of."""
        return Key(self.set, self.metric, self.attack, self.step)

    @property
    def is_finite(self) -> bool:
        """Whether value and rows are finite numbers."""
        return all(map(math.isfinite, (self.value, *self.rows)))

    @property
    def additions(self) -> list[float]:
        """What each row adds to the value, whose mean is the value; empty where no row adds by itself."""
        add = AVERAGES[self.average]
        return [] if add is None else [add(row) for row in self.rows]

    @classmethod
    def averaged(cls, set: str, metric: str, rows: Sequence[float], average: str = "mean", **other: Any) -> Score:
        """The score whose value follows from its rows."""
        add = AVERAGES[average]
        assert add is not None
        return cls(set, metric, mean(map(add, rows)), list(rows), average, **other)


def difference(one: Score, other: Score) -> tuple[str, Any, Any] | None:
    """
    What two scores of one key differ in that are not to be compared: the name of a setting, and what it is for each.

    `None` if both were measured alike: all settings agree, and the number of rows.
    """
    own, others = ({**score.settings, "number of rows": len(score.rows)} for score in (one, other))
    names = dict.fromkeys([*own, *others])
    return next(((name, own.get(name), others.get(name)) for name in names if own.get(name) != others.get(name)), None)


class Scores(dict[Key, Score]):
    """The scores of one model, by key: `Scores([score, ...])`. A later score takes the place of an earlier one."""

    def __init__(self, scores: Iterable[Score] = ()) -> None:
        super().__init__((score.key, score) for score in scores)

    def add(self, scores: Iterable[Score]) -> None:
        """Take these in as well."""
        self.update((score.key, score) for score in scores)

    def of(self, set: str, metric: str, attack: str | None = None, step: float | None = None) -> Score | None:
        """The score of this key, or `None`."""
        return self.get(Key(set, metric, attack, step))

    @property
    def after_requests(self) -> Scores:
        """Those that were measured after some of several requests, which is their `step`."""
        return Scores(score for key, score in self.items() if key.attack is None and key.step is not None)

    def to_list(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(score) for score in self.values()]

    @classmethod
    def from_list(cls, rows: Iterable[dict[str, Any]]) -> Scores:
        """What `to_list` gave; a `TypeError` if that is something else."""
        scores = [Score(**row) for row in rows]
        for score in scores:
            if not all(isinstance(number, (int, float)) for number in (score.value, *score.rows)):
                raise TypeError(f"`{score.key}` is {score.value!r} with rows that are not all numbers")
        return cls(scores)
