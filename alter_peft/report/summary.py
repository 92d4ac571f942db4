# SPDX-License-Identifier: Apache-2.0
"""The cells of a benchmark, gathered by model and compared with the oracles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

from alter_peft.evaluation.attacks import ATTACKS, control
from alter_peft.evaluation.metrics import METRICS, is_guard, is_ingredient
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.open_unlearning import COMPOSITES, OPEN_UNLEARNING
from alter_peft.evaluation.oracle import AUC, MIN_K, Band, band_of, leave_one_out, min_k_auc
from alter_peft.evaluation.results import ORACLE, TARGET, Result
from alter_peft.evaluation.scores import Key, Score, Scores
from alter_peft.evaluation.tables import steps_left_out
from alter_peft.evaluation.tasks import TASKS
from alter_peft.evaluation.tasks.tofu import FORGET_SETS, MODEL_UTILITY, UTILITY

from .estimates import Estimate, estimate


LARGEST, MEAN = "largest", "mean of the sets"


def known_metrics() -> dict[str, Metric]:
    """Every metric that a score may have but for the shares of the experts."""
    of_tasks = {name: metric for task in TASKS.values() for name, metric in task.metrics.items()}
    of_attacks = {name: metric for attack in ATTACKS.values() for name, metric in attack.metrics.items()}
    return {**METRICS, **of_tasks, **of_attacks, **COMPOSITES}


def is_of_set(key: Key) -> bool:
    """
    Whether a score is of a set that the model was asked as it is: what has a distance.

    Guards have none, nor what open-unlearning's composites are made of, which would count twice.
    """
    plain = key.attack is None and key.step is None and key.set != OPEN_UNLEARNING
    return plain and not is_guard(key.metric) and not is_ingredient(key.metric)


def is_share(key: Key) -> bool:
    """Whether a score is the share of tokens that an expert took."""
    return key.attack is None and is_guard(key.metric) and key.metric not in METRICS


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
    def zero_parts(self) -> list[Key]:
        """Which of the nine scores of model utility are 0 where it is."""
        zero = [values for values in self.values if values.get(MODEL_UTILITY) == 0]
        return list(dict.fromkeys(key for values in zero for key in UTILITY if values.get(key) == 0))

    @cached_property
    def scores(self) -> list[Scores]:
        """The scores of each measured cell, and the AUC of membership where there is `min_k` of what it is made of."""
        return [_with_auc(result.scores) for result in self.results]

    @cached_property
    def values(self) -> list[dict[Key, float]]:
        """The numbers of each measured cell."""
        return [{key: score.value for key, score in scores.items()} for scores in self.scores]

    def found(self, key: Key) -> list[float]:
        """A number of the seeds that have it."""
        return [values[key] for values in self.values if key in values]

    def estimate(self, key: Key) -> Estimate | None:
        """Mean and spread over the seeds that have this number; `None` if none has."""
        return estimate(self.found(key), len(self.results))


def _with_auc(scores: Scores) -> Scores:
    if AUC in scores or not set(MIN_K) <= scores.keys():
        return scores
    return Scores([*scores.values(), min_k_auc(scores)])


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
    def target(self) -> Model | None:
        """The model before unlearning, if it was measured."""
        return next((model for model in self.measured if model.name == TARGET), None)

    @property
    def measured(self) -> list[Model]:
        """The models of which at least one cell did not fail."""
        return [model for model in self.models if model.results]

    @property
    def methods(self) -> list[Model]:
        """What unlearned, and did not fail."""
        return [model for model in self.measured if model.name not in (TARGET, ORACLE)]

    @cached_property
    def keys(self) -> list[Key]:
        """Every score that any cell has; those of a curve stand together, step by step."""
        found = dict.fromkeys(key for model in self.measured for values in model.values for key in values)
        places = {curve: place for place, curve in enumerate(dict.fromkeys(key._replace(step=None) for key in found))}
        return sorted(found, key=lambda key: (places[key._replace(step=None)], key.step is not None, key.step or 0))

    @cached_property
    def bands(self) -> dict[Key, Band]:
        """The oracles' band of each score of the sets that all of them have, guards left out."""
        oracles = self.oracle.scores
        shared = [key for key in self.keys if is_of_set(key) and all(key in scores for scores in oracles)]
        return {key: band_of([scores[key] for scores in oracles]) for key in shared}

    @cached_property
    def attack_bands(self) -> dict[Key, Band]:
        """The band of each score under attack of the oracles that have it or its control, if they are two at least."""
        return {key: band_of(scores) for key, scores in self.attacked_oracles.items() if len(scores) > 1}

    @cached_property
    def attacked_oracles(self) -> dict[Key, list[Score]]:
        """Each score under attack -> the same or its control of the oracles that have one."""
        keys = [key for key in self.keys if key.attack is not None]
        every = {key: [control(scores, key) for scores in self.oracle.scores] for key in keys}
        return {key: [score for score in scores if score is not None] for key, scores in every.items()}

    @cached_property
    def attacks(self) -> list[Key]:
        """The scores under attack that are shown: of relearning the last step, and the farthest of each method."""
        found = [
            {key: band.distance(values[key]) for key, band in self.attack_bands.items() if key in values}
            for model in self.methods
            for values in model.values
        ]
        left_out = steps_left_out(self.keys, found)
        return [key for key in self.keys if key.attack is not None and key not in left_out]

    def distances(self, values: Mapping[Key, float]) -> dict[Key, float]:
        """Two-sided distances of a cell's numbers to the oracle, in units of its band."""
        return {key: found.distance(values[key]) for key, found in self.bands.items() if key in values}

    @cached_property
    def oracle_distances(self) -> list[dict[Key, float]]:
        """Those of each oracle to the band of the others; empty if there are fewer than three."""
        return leave_one_out([Scores(scores[key] for key in self.bands) for scores in self.oracle.scores])

    @property
    def counted(self) -> list[Key]:
        """
        The scores that a mean distance is taken over: all with a band, but model utility beside its parts, of which
        the first is the same in all tasks that have one.
        """
        return [key for key in self.bands if key != MODEL_UTILITY or UTILITY[0] not in self.bands]

    def summary(self, distances: Mapping[Key, float]) -> dict[str, float]:
        """
        All distances of a cell as a few numbers, without signs: the largest; the mean over the scores of each set,
        `"mean of {set}"`; and the mean of these, so that a set with many scores counts once.

        The three forms in which the forget set is asked are one set.

        Raises:
            ValueError: some of the scores that are `counted` are missing.
        """
        missing = [str(key) for key in self.counted if key not in distances]
        if missing:
            raise ValueError(f"There is no mean distance to the oracle without the scores {missing}.")
        of_sets: dict[str, list[float]] = {}
        for key in self.counted:
            name = "forget" if key.set in FORGET_SETS else key.set
            of_sets.setdefault(name, []).append(abs(distances[key]))
        means = {f"mean of {name}": mean(found) for name, found in of_sets.items()}
        return {LARGEST: max(map(max, of_sets.values())), **means, MEAN: mean(means.values())}

    def summaries(self, model: Model) -> list[dict[str, float]]:
        """Of each seed of a model; empty if one of them lacks a score. Of an oracle it is beside the others."""
        distances = self.oracle_distances if model.name == ORACLE else list(map(self.distances, model.values))
        if any(key not in found for found in distances for key in self.counted):
            return []
        return [self.summary(found) for found in distances]
