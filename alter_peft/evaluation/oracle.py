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
"""Two-sided scores: how far a model is from oracles that never saw the forget set, in units of their own spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import mean, median, stdev
from typing import NamedTuple

from .measure import Score
from .metrics import ForgetQuality, forget_quality, membership_auc, privleak


Scores = Mapping[str, Score]


class Band(NamedTuple):
    """What retraining from scratch gives, over seeds: mean and sample standard deviation of the oracles' scores."""

    center: float
    spread: float

    def distance(self, value: float) -> float:
        """
        (value - center) / spread: 0 is the oracle, and below it counts as much as above it.

        Where the oracles agree exactly, any other value is infinitely far.
        """
        if value == self.center:
            return 0.0
        return (value - self.center) / self.spread if self.spread else math.copysign(math.inf, value - self.center)


def band(values: Sequence[float]) -> Band:
    """
    The band of the oracles' scores, one for each seed.

    Raises:
        ValueError: fewer than two oracles, which have no spread.
    """
    if len(values) < 2:
        raise ValueError(
            f"There are {len(values)} oracles, but a band needs at least 2 of different seeds. Train more "
            "(`oracle_seeds`)."
        )
    return Band(mean(values), stdev(values))


class Distance(NamedTuple):
    """A score beside the oracles' band, and how many of their standard deviations it is away."""

    value: float
    band: Band
    distance: float


def against_band(value: float, oracle_values: Sequence[float]) -> Distance:
    """A model's score beside those of the oracles, one for each seed."""
    found = band(oracle_values)
    return Distance(value, found, found.distance(value))


def distances(scores: Scores, oracles: Sequence[Scores]) -> dict[str, Distance]:
    """
    Every score that oracles have beside their band; what they can't have (such as routing) has no distance.

    Raises:
        ValueError: fewer than two oracles, or the model or one of the oracles lacks a score that another oracle has.
    """
    names = list(dict.fromkeys(key for oracle in oracles for key in oracle))
    values = ((name, [_of(label, one, name).value for label, one in _all(scores, oracles)]) for name in names)
    return {name: against_band(own, of_oracles) for name, (own, *of_oracles) in values}


class Spread(NamedTuple):
    """Median of several numbers, and the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float


class QualityBesideNull(NamedTuple):
    """
    Forget quality against each oracle, beside what it is between two oracles, which differ in their seed alone.

    statistic, pvalue: of the two-sample KS tests of the model's truth ratios against each oracle's.
    null_statistic, null_pvalue: of each pair of oracles.
    """

    statistic: Spread
    pvalue: Spread
    null_statistic: Spread
    null_pvalue: Spread


def quality_beside_null(ratios: Sequence[float], oracle_ratios: Sequence[Sequence[float]]) -> QualityBesideNull:
    """
    Forget quality of a model against several oracles (see `QualityBesideNull`).

    Args:
        ratios: the model's truth ratios on the forget set.
        oracle_ratios: those of each oracle.

    Raises:
        ValueError: fewer than two oracles, so that there is no pair of them.
    """
    if len(oracle_ratios) < 2:
        raise ValueError(
            f"There are {len(oracle_ratios)} oracles, but forget quality is read beside that of two oracles of "
            "different seeds. Train more (`oracle_seeds`)."
        )
    own = [forget_quality(ratios, of_oracle) for of_oracle in oracle_ratios]
    null = [forget_quality(one, other) for one, other in combinations(oracle_ratios, 2)]
    return QualityBesideNull(*_spreads(own), *_spreads(null))


def _spreads(tests: Sequence[ForgetQuality]) -> list[Spread]:
    return [Spread(median(values), min(values), max(values)) for values in zip(*tests, strict=True)]


class Membership(NamedTuple):
    """
    Can the forget rows be told from rows that were never seen?

    auc: of Min-K% (see `membership_auc`) beside the oracles' band.
    privleak: against the oracles' mean AUC, in percent.
    """

    auc: Distance
    privleak: float


def membership(auc: float, oracle_aucs: Sequence[float]) -> Membership:
    """A model's `membership_auc` beside those of the oracles."""
    beside = against_band(auc, oracle_aucs)
    return Membership(beside, privleak(auc, beside.band.center))


class Comparison(NamedTuple):
    """A model beside several oracles: every score that they share, forget quality and membership."""

    distances: dict[str, Distance]
    forget_quality: QualityBesideNull
    membership: Membership


def compare_with_oracles(scores: Scores, oracles: Sequence[Scores]) -> Comparison:
    """
    A model's scores beside those of oracles of different seeds, with truth ratio and Min-K% on `"forget"` and Min-K%
    on `"holdout"` among them.

    Raises:
        ValueError: fewer than two oracles, or a score that is needed and missing.
    """
    ratios, *oracle_ratios = ([*_of(label, one, "forget/truth_ratio").rows] for label, one in _all(scores, oracles))
    auc, *oracle_aucs = (
        membership_auc(_of(label, one, "forget/min_k").rows, _of(label, one, "holdout/min_k").rows)
        for label, one in _all(scores, oracles)
    )
    return Comparison(
        distances(scores, oracles), quality_beside_null(ratios, oracle_ratios), membership(auc, oracle_aucs)
    )


def _all(scores: Scores, oracles: Sequence[Scores]) -> list[tuple[str, Scores]]:
    """The model's scores and then each oracle's, with what messages call them."""
    return [("`scores`", scores), *((f"`oracles[{i}]`", oracle) for i, oracle in enumerate(oracles))]


def _of(label: str, scores: Scores, name: str) -> Score:
    if name not in scores:
        raise ValueError(
            f"{label} has no {name!r}, which is compared. Measure it with the same metrics as the others."
        )
    return scores[name]
