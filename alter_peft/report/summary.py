# SPDX-License-Identifier: Apache-2.0
"""The cells of a benchmark, gathered by model and compared with the oracles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from alter_peft.evaluation.oracle import MIN_K, Band, band_of, leave_one_out, min_k_auc
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.scores import Score
from alter_peft.evaluation.tasks.tofu import FORGET_SETS, UTILITY


TARGET, ORACLE = "target", "oracle"
# attack -> first parts of the names of its scores and curves; all other scores are of sets that a model is asked
ATTACK_KEYS = {
    "asking_otherwise": ("asked",),
    "sampling": ("sampling",),
    "membership": ("membership",),
    "switching_off": ("switched_off", "expert_off"),
    "quantization": ("quantized",),
    "merged_quantization": ("merged",),
    "relearning": ("relearn_half", "relearn_related"),
}
# What an oracle is measured by in place of an attack on an adapter, by the first part of the names
CONTROL = {"switched_off": "forget", "merged": "quantized"}
# Metrics that tell a broken model or a wrong route from success; no distance is taken of them.
GUARDS = ("unique_tokens", "fluency", "high_entropy", "astray")
SHARE = "expert_"  # and a number: the share of tokens that an expert took
MODEL_UTILITY = "utility/model_utility"
AUC = "forget/membership_auc"
LARGEST, MEAN = "largest", "mean of the sets"


class Estimate(NamedTuple):
    """
    A mean over the seeds of a model.

    spread: sample standard deviation; `None` for a single value.
    measured, cells: how many of how many measured seeds have the score.
    """

    mean: float
    spread: float | None
    measured: int
    cells: int


def estimate(values: Sequence[float], cells: int) -> Estimate | None:
    """Mean and spread of what was found in so many cells; `None` if nothing was."""
    if not values:
        return None
    spread = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Estimate(mean(values), spread, len(values), cells)


@dataclass
class Model:
    """The cells of one name, seed by seed: those with scores, and those that failed or stopped before they had any."""

    name: str
    results: list[Result]
    failed: list[Result]

    @property
    def label(self) -> str:
        """The name, and how many seeds stand behind it."""
        return self.label_of(len(self.results) or len(self.failed))

    def label_of(self, count: int) -> str:
        """The name, and how many of its seeds are shown."""
        total = len(self.results) + len(self.failed)
        if count < total:
            return f"{self.name} ({count} of {total} seeds)"
        return self.name if total == 1 else f"{self.name} ({total} seeds)"

    @property
    def zero_parts(self) -> list[str]:
        """Which of the nine scores of model utility are 0 where it is."""
        zero = [values for values in self.values if values.get(MODEL_UTILITY) == 0]
        return list(dict.fromkeys(key for values in zero for key in UTILITY if values.get(key) == 0))

    @cached_property
    def scores(self) -> list[dict[str, Score]]:
        """
        The scores of each measured cell (see `with_steps`), and `forget/membership_auc` where there is `min_k` of
        forget set and holdout.
        """
        return [_scores(result) for result in self.results]

    @cached_property
    def values(self) -> list[dict[str, float]]:
        """The numbers of each measured cell: its `scores`, and `seconds/{part}`."""
        return [
            {key: score.value for key, score in scores.items()}
            | {f"seconds/{part}": seconds for part, seconds in result.seconds.items()}
            for scores, result in zip(self.scores, self.results, strict=True)
        ]

    def found(self, key: str) -> list[float]:
        """A number of the seeds that have it."""
        return [values[key] for values in self.values if key in values]

    def estimate(self, key: str) -> Estimate | None:
        """Mean and spread over the seeds that have this number; `None` if none has."""
        return estimate(self.found(key), len(self.results))


def _scores(result: Result) -> dict[str, Score]:
    scores = with_steps(result)
    if AUC not in scores and set(MIN_K) <= scores.keys():
        scores[AUC] = min_k_auc(scores)
    return scores


def with_steps(result: Result) -> dict[str, Score]:
    """The scores of a result; those of relearning by step are without rows in files of before they had some."""
    scores = dict(result.scores)
    return scores


def steps_left_out(results: Sequence[Result], distances: Sequence[Mapping[str, float]]) -> set[str]:
    """
    The scores of relearning that tables leave out: those of a curve, but the last and the farthest from the oracles.

    Args:
        results: those whose curves are shown.
        distances: by score, of each model of which the farthest step is shown.
    """
    curves = {key: set[float]() for result in results for key in filter(is_attack, result.curves)}
    left_out: set[str] = set()
    for key, steps in curves.items():
        for result in results:
            steps |= {step for step, _ in result.curves.get(key, [])}
        names = [f"{key}, step {step:g}" for step in sorted(steps)]
        left_out.update(names[:-1])
        for found in distances:
            measured = [name for name in names if name in found]
            left_out.discard(max(measured, key=lambda name: abs(found[name]), default=""))
    return left_out


@dataclass
class Benchmark:
    """All models of a benchmark: target, oracle and methods, in this order."""

    folder: Path
    models: list[Model]

    @property
    def oracle(self) -> Model:
        """The models that never saw the forget set."""
        return next(model for model in self.models if model.name == ORACLE)

    @property
    def measured(self) -> list[Model]:
        """The models of which at least one cell did not fail."""
        return [model for model in self.models if model.results]

    @property
    def methods(self) -> list[Model]:
        """What unlearned, and did not fail."""
        return [model for model in self.measured if model.name not in (TARGET, ORACLE)]

    def keys(self) -> list[str]:
        """Every number that any cell has."""
        return list(dict.fromkeys(key for model in self.measured for values in model.values for key in values))

    @cached_property
    def bands(self) -> dict[str, Band]:
        """The oracles' band of each score of the sets that all of them have, guards left out."""
        oracles = self.oracle.scores
        shared = [key for key in self.keys() if is_of_set(key) and all(key in scores for scores in oracles)]
        return {key: band_of(key, [scores[key] for scores in oracles]) for key in shared}

    @cached_property
    def attack_bands(self) -> dict[str, Band]:
        """The band of each score under attack of the oracles that have it or its control, if they are two at least."""
        return {key: band_of(key, scores) for key, scores in self.attacked_oracles.items() if len(scores) > 1}

    @cached_property
    def attacked_oracles(self) -> dict[str, list[Score]]:
        """Each score under attack -> the same or its control of the oracles that have one."""
        every = {
            key: [control(scores, key) for scores in self.oracle.scores] for key in filter(is_attack, self.keys())
        }
        return {key: [score for score in scores if score is not None] for key, scores in every.items()}

    @cached_property
    def attacks(self) -> list[str]:
        """The scores under attack that are shown: of relearning the last step, and the farthest of each method."""
        found = [
            {key: band.distance(values[key]) for key, band in self.attack_bands.items() if key in values}
            for model in self.methods
            for values in model.values
        ]
        left_out = steps_left_out([cell for model in self.measured for cell in model.results], found)
        return [key for key in self.keys() if is_attack(key) and key not in left_out]

    def distances(self, values: Mapping[str, float]) -> dict[str, float]:
        """Two-sided distances of a cell's numbers to the oracle, in units of its band."""
        return {key: found.distance(values[key]) for key, found in self.bands.items() if key in values}

    @cached_property
    def oracle_distances(self) -> list[dict[str, float]]:
        """Those of each oracle to the band of the others; empty if there are fewer than three."""
        return leave_one_out([{key: scores[key] for key in self.bands} for scores in self.oracle.scores])

    @property
    def counted(self) -> list[str]:
        """The scores that a mean distance is taken over: all with a band, but model utility beside its nine parts."""
        return [key for key in self.bands if key != MODEL_UTILITY or not set(UTILITY) <= self.bands.keys()]

    def summary(self, distances: Mapping[str, float]) -> dict[str, float]:
        """
        All distances of a cell as a few numbers, without signs: the largest; the mean over the scores of each set,
        `"mean of {set}"`; and the mean of these, so that a set with many scores counts once.

        The three forms in which the forget set is asked are one set.

        Raises:
            ValueError: some of the scores that are `counted` are missing.
        """
        missing = [key for key in self.counted if key not in distances]
        if missing:
            raise ValueError(f"There is no mean distance to the oracle without the scores {missing}.")
        of_sets: dict[str, list[float]] = {}
        for key in self.counted:
            name = key.rpartition("/")[0]
            of_sets.setdefault("forget" if name in FORGET_SETS else name, []).append(abs(distances[key]))
        means = {f"mean of {name}": mean(found) for name, found in of_sets.items()}
        return {LARGEST: max(map(max, of_sets.values())), **means, MEAN: mean(means.values())}


def attack_of(key: str) -> str | None:
    """The attack that a score or a curve comes from; `None` if the model was measured as it is."""
    first = key.partition("/")[0]
    return next((attack for attack, parts in ATTACK_KEYS.items() if first in parts), None)


def control(scores: Mapping[str, Score], key: str) -> Score | None:
    """
    A score of an oracle, or of an attack that it has no adapter for what takes its place (`CONTROL`): of an adapter
    switched off its own scores on the forget set, and of a rounded merge those of its rounded weights.
    """
    first, _, rest = key.partition("/")
    return scores.get(key) or (scores.get(f"{CONTROL[first]}/{rest}") if first in CONTROL else None)


def is_attack(key: str) -> bool:
    """Whether a score or a curve is of a model under attack."""
    return attack_of(key) is not None


def is_guard(key: str) -> bool:
    """Whether a number is a guard's."""
    return not is_attack(key) and key.rpartition("/")[2] in GUARDS


def is_of_set(key: str) -> bool:
    """Whether a number is a score of a set that the model was asked, and no guard: what has a distance."""
    metric = key.rpartition("/")[2]
    timing = key.startswith("seconds/")  # the name of a part may be a path: "seconds/task: data/arc.jsonl"
    return not timing and not is_attack(key) and metric not in GUARDS and not metric.startswith(SHARE)
