# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The cells of a benchmark, read from its folder, gathered by model and compared with the oracles."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from .metrics import membership_auc
from .oracle import Band, band
from .results import Result


TARGET, ORACLE = "target", "oracle"
# First parts of the names of scores and curves under attack; all other scores are of sets that a model is asked.
ATTACKS = (
    "asked",
    "sampling",
    "membership",
    "switched_off",
    "expert_off",
    "quantized",
    "merged",
    "relearn_half",
    "relearn_related",
)
RATIOS = "forget/truth_ratio"
# Metrics that tell a broken model or a wrong route from success; no distance is taken of them.
GUARDS = ("unique_tokens", "fluency", "high_entropy", "astray")
SHARE = "expert_"  # and a number: the share of tokens that an expert took


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


def estimate(values: Sequence[float], measured: int, cells: int) -> Estimate | None:
    """Mean and spread of what was found; `None` if nothing was."""
    if not values:
        return None
    spread = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Estimate(mean(values), spread, measured, cells)


@dataclass
class Model:
    """The cells of one name, seed by seed: those that have scores, and those that failed before they had any."""

    name: str
    results: list[Result]
    failed: list[Result]

    @property
    def label(self) -> str:
        """The name, and how many seeds stand behind it."""
        total = len(self.results) + len(self.failed)
        if self.results and self.failed:
            return f"{self.name} ({len(self.results)} of {total} seeds)"
        return self.name if total == 1 else f"{self.name} ({total} seeds)"

    @cached_property
    def values(self) -> list[dict[str, float]]:
        """
        The numbers of each measured cell: its scores; `seconds/{part}`; `forget/membership_auc` where there is `min_k`
        of forget set and holdout; and where a curve under attack ends, `"{attack}/{set}, step 50/{metric}"`.
        """
        return [_values(result) for result in self.results]

    def estimate(self, key: str) -> Estimate | None:
        """Mean and spread over the seeds that have this number; `None` if none has."""
        found = [values[key] for values in self.values if key in values]
        return estimate(found, len(found), len(self.results))


def _values(result: Result) -> dict[str, float]:
    values = {key: score.value for key, score in result.scores.items()}
    values |= {f"seconds/{part}": seconds for part, seconds in result.seconds.items()}
    if "forget/membership_auc" not in values and {"forget/min_k", "holdout/min_k"} <= values.keys():
        rows = (result.scores[key].rows for key in ("forget/min_k", "holdout/min_k"))
        values["forget/membership_auc"] = membership_auc(*rows)
    for key, points in result.curves.items():
        name, _, metric = key.rpartition("/")
        if is_attack(key) and points:
            x, value = max(points)
            values[f"{name}, step {x:g}/{metric}"] = value
    return values


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
        shared = [key for key in self.keys() if is_of_set(key) and all(key in found for found in self.oracle.values)]
        return {key: band([found[key] for found in self.oracle.values]) for key in shared}

    def distances(self, values: dict[str, float]) -> dict[str, float]:
        """Two-sided distances of a cell's numbers to the oracle, in units of its band."""
        return {key: found.distance(values[key]) for key, found in self.bands.items() if key in values}

    def mean_distance(self, values: dict[str, float]) -> float:
        """
        Mean absolute distance over all scores that have a band.

        Infinite ones, where the oracles agree exactly, are left out: they have no unit.

        Raises:
            ValueError: the cell lacks some of these scores.
        """
        missing = [key for key in self.bands if key not in values]
        if missing:
            raise ValueError(f"There is no mean distance to the oracle without the scores {missing}.")
        found = [abs(value) for key, value in self.distances(values).items() if self.bands[key].spread]
        return mean(found)


def is_attack(key: str) -> bool:
    """Whether a score or a curve is of a model under attack."""
    return key.partition("/")[0] in ATTACKS


def is_guard(key: str) -> bool:
    """Whether a number is a guard's."""
    return not is_attack(key) and key.rpartition("/")[2] in GUARDS


def is_of_set(key: str) -> bool:
    """Whether a number is a score of a set that the model was asked, and no guard: what has a distance."""
    name, _, metric = key.rpartition("/")
    return name != "seconds" and not is_attack(key) and metric not in GUARDS and not metric.startswith(SHARE)


def read_benchmark(folder: Path) -> Benchmark:
    """
    All cells of a benchmark, `folder/*/result.json`.

    Raises:
        ValueError: a folder without results, without two measured oracles or without a method; a file that is no
            result; a cell that was measured but shares no score with the oracles; two cells of one name and seed.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` is '{folder}', but there is no such folder.")
    cells: dict[str, dict[int, Result]] = defaultdict(dict)
    for path in sorted(folder.glob("*/result.json")):
        result = _load(path)
        if result.seed in cells[result.name]:
            raise ValueError(
                f"'{path}' is a second cell of {result.name} with seed {result.seed}. Remove one of them."
            )
        cells[result.name][result.seed] = result
    if not cells:
        raise ValueError(f"`folder` is '{folder}', but there is no */result.json in it. Run the benchmark first.")
    names = sorted(cells, key=lambda name: ((TARGET, ORACLE).index(name) if name in (TARGET, ORACLE) else 2, name))
    models = []
    for name in names:
        seeds = [result for _, result in sorted(cells[name].items())]
        models.append(
            Model(
                name,
                [result for result in seeds if result.scores or result.error is None],
                [result for result in seeds if not result.scores and result.error is not None],
            )
        )
    benchmark = Benchmark(folder, models)
    _check(benchmark)
    return benchmark


def _load(path: Path) -> Result:
    try:
        result = Result.load(path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is no result of a benchmark ({error}). Remove it, or run that cell again."
        ) from error
    for key, score in result.scores.items():
        if not isinstance(score.value, (int, float)) or math.isnan(score.value):
            raise ValueError(f"'{path}' has {score.value} as `{key}`, which is no number. Run that cell again.")
    return result


def _check(benchmark: Benchmark) -> None:
    folder, names = benchmark.folder, [model.name for model in benchmark.models]
    if ORACLE not in names:
        raise ValueError(f"'{folder}' has no oracle, only {names}. Train models without the forget set beside them.")
    oracle = benchmark.oracle
    if len(oracle.results) < 2:
        errors = "".join(f"; seed {cell.seed} failed: {cell.error}" for cell in oracle.failed)
        raise ValueError(
            f"'{folder}' has {len(oracle.results)} measured oracles{errors}. A band needs at least 2 of different "
            "seeds."
        )
    if not set(names) - {TARGET, ORACLE}:
        raise ValueError(f"'{folder}' has no method, only {names}. Run one on the target.")
    if not any(found.spread for found in benchmark.bands.values()):
        raise ValueError(f"The oracles of '{folder}' do not differ in any score. Train them with different seeds.")
    known = {key for values in oracle.values for key in values}
    _check_rows(benchmark)
    for model in benchmark.models:
        for result in model.results:
            if not result.scores:
                raise ValueError(
                    f"'{folder}': {model.name} of seed {result.seed} has neither scores nor an error. Run it again."
                )
            if not known & result.scores.keys():
                raise ValueError(
                    f"'{folder}': {model.name} of seed {result.seed} has no score that the oracles have; it has "
                    f"{list(result.scores)}, they have {sorted(known)}. Measure both alike."
                )


def _check_rows(benchmark: Benchmark) -> None:
    """Truth ratios of other questions are not to be compared."""
    cells = [cell for model in benchmark.models for cell in model.results if RATIOS in cell.scores]
    for cell in cells[1:]:
        counts = [len(one.scores[RATIOS].rows) for one in (cells[0], cell)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"'{benchmark.folder}': `{RATIOS}` has {counts[0]} rows for {cells[0].name} of seed {cells[0].seed}, "
                f"but {counts[1]} for {cell.name} of seed {cell.seed}. Measure all on the same questions."
            )
