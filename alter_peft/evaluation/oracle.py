# SPDX-License-Identifier: Apache-2.0
"""Two-sided scores: how far a model is from oracles that never saw the forget set, in units of their own spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product
from statistics import mean, median, stdev
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.stats import t

from .metrics.membership import above_holdout, privleak
from .metrics.truth_ratio import forget_quality
from .scores import Key, Score, Scores


T = TypeVar("T")
MIN_K = (Key("forget", "min_k"), Key("holdout", "min_k"))
AUC = Key("forget", "membership_auc")
RATIOS = Key("forget", "truth_ratio")
COMPARED = (RATIOS, *MIN_K)  # what forget quality, membership and PrivLeak are made of
# of the four of Liu et al. (arXiv 2406.07933) the two that need no model of their own: not METEOR and BERTScore
SIMILARITIES = (Key("forget", "rouge_f"), Key("forget", "bleu"))


class Band(NamedTuple):
    """
    What retraining from scratch gives, over k seeds: the mean of the oracles' scores, and their spread.

    spread: the unit of every distance, the larger of two estimates of what another seed changes. The first is the
        sample standard deviation of the oracles' scores. It has k - 1 degrees of freedom, so that a few oracles agree
        by chance now and then. The second is the standard error that the rows have by the seed alone,
        sqrt(mean over rows of their variance over the oracles / rows): what the first is expected to be if a seed
        moves each row by itself, and a lower bound of it if a seed moves rows together. How much the questions differ
        from one another is no part of it, since all models are asked the same ones. Where the oracles agree in every
        row, it is 1 / (rows sqrt(k)): what one row of one oracle that came out otherwise by 1 would make. A score
        without rows has the first alone.
    """

    center: float
    spread: float

    def distance(self, value: float) -> float:
        """
        (value - center) / spread: 0 is the oracle, and below it counts as much as above it.

        Where oracles without rows agree exactly, any other value is infinitely far.
        """
        if value == self.center:
            return 0.0
        return (value - self.center) / self.spread if self.spread else math.copysign(math.inf, value - self.center)


def band(values: Sequence[float], rows: Sequence[Sequence[float]] = ()) -> Band:
    """
    The band of the oracles' scores, one for each seed.

    Args:
        rows: of each oracle, what each row adds to its score; the same questions in the same order.

    Raises:
        ValueError: fewer than two oracles, which have no spread, or rows of other questions.
    """
    if len(values) < 2:
        raise ValueError(
            f"There are {len(values)} oracles, but a band needs at least 2 of different seeds. Train more "
            "(`oracle_seeds`)."
        )
    counts = {len(of_oracle) for of_oracle in rows}
    if len(counts) > 1:
        raise ValueError(f"The oracles have {sorted(counts)} rows of one score. Measure all on the same questions.")
    spread = stdev(values)
    count = counts.pop() if counts else 0
    if count:
        of_rows = np.asarray(rows, dtype=float)
        # from the first oracle, since the mean of equal numbers may be rounded to another one
        by_seed = float(np.var(of_rows - of_rows[0], axis=0, ddof=1).mean())
        spread = max(spread, math.sqrt(by_seed / count)) or 1 / (count * math.sqrt(len(values)))
    return Band(mean(values), spread)


def cutoff(oracles: int, share: float = 0.95) -> float:
    """
    How far from its fellows a true oracle is at most, with this probability: t_{k-1} sqrt(1 + 1/k).

    The distance of one more normal value from the mean of k, in their sample standard deviation, is so distributed
    (Student). Where the rows give the larger spread, it is less far.

    Args:
        oracles: k, the number of those that make the band.
    """
    return float(t.ppf((1 + share) / 2, oracles - 1)) * math.sqrt(1 + 1 / oracles)


def band_of(scores: Sequence[Score]) -> Band:
    """
    The band of one score of the oracles, with what its rows add to it if all of them have some.

    Of a score that is no mean over its rows all add the same, so that their number counts alone.
    """
    with_rows = all(score.rows for score in scores)
    rows = [score.additions or [score.value] * len(score.rows) for score in scores] if with_rows else []
    return band([score.value for score in scores], rows)


class Distance(NamedTuple):
    """A score beside the oracles' band, and how many of their standard deviations it is away."""

    value: float
    band: Band
    distance: float


def against_oracles(score: Score, oracle_scores: Sequence[Score]) -> Distance:
    """A model's score beside those of the oracles, one for each seed."""
    found = band_of(oracle_scores)
    return Distance(score.value, found, found.distance(score.value))


def distances(scores: Scores, oracles: Sequence[Scores]) -> dict[Key, Distance]:
    """
    Every score that oracles have beside their band; what they can't have (such as routing) has no distance.

    Raises:
        ValueError: fewer than two oracles, or the model or one of the oracles lacks a score that another oracle has.
    """
    keys = list(dict.fromkeys(key for oracle in oracles for key in oracle))
    values = ((key, [_of(label, one, key) for label, one in _all(scores, oracles)]) for key in keys)
    return {key: against_oracles(own, of_oracles) for key, (own, *of_oracles) in values}


def leave_one_out(oracles: Sequence[Scores]) -> list[dict[Key, float]]:
    """
    The distances of each oracle to the band of the others; empty if there are fewer than three.

    Another true oracle would be closer: its band has one oracle more (see `cutoff`).
    """
    if len(oracles) < 3:
        return []
    return [
        {key: found.distance for key, found in distances(oracle, others(oracles, i)).items()}
        for i, oracle in enumerate(oracles)
    ]


def others(values: Sequence[T], index: int) -> list[T]:
    """All but one, for an oracle that is compared with the others."""
    return [*values[:index], *values[index + 1 :]]


class Spread(NamedTuple):
    """Median of several numbers, and the lowest and the highest of them."""

    median: float
    lowest: float
    highest: float

    def text(self, form: str) -> str:
        """`0.5 (0.1 to 0.9)`, each number in this format."""
        return f"{self.median:{form}} ({self.lowest:{form}} to {self.highest:{form}})"


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one number."""
    return Spread(median(values), min(values), max(values))


class QualityBesideNull(NamedTuple):
    """
    Forget quality against each oracle, beside what it is between two oracles, which differ in their seed alone.

    statistic, pvalue: of the two-sample KS tests of the model's truth ratios against each oracle's.
    null_statistic, null_pvalue: of each pair of oracles, the null. No formula stands in for them: a p-value is uniform
        under independent samples, and these are of the same questions.
    """

    statistic: Spread
    pvalue: Spread
    null_statistic: Spread
    null_pvalue: Spread


def quality_beside_null(ratios: Sequence[float], oracle_ratios: Sequence[Sequence[float]]) -> QualityBesideNull:
    """
    Of the truth ratios on the forget set of a model, and of each oracle.

    Raises:
        ValueError: fewer than two oracles, so that there is no pair of them.
    """
    if len(oracle_ratios) < 2:
        raise ValueError(
            f"There are {len(oracle_ratios)} oracles, but forget quality is read beside that of two oracles of "
            "different seeds. Train more (`oracle_seeds`)."
        )
    pairs = (product([ratios], oracle_ratios), combinations(oracle_ratios, 2))
    tests = ([forget_quality(*pair) for pair in of_pairs] for of_pairs in pairs)
    return QualityBesideNull(*(spread_of(values) for found in tests for values in zip(*found, strict=True)))


def min_k_auc(scores: Scores) -> Score:
    """
    `forget/membership_auc`: that of Min-K% on `"forget"` and `"holdout"`; its rows are `above_holdout`.

    Raises:
        ValueError: one of the two is missing.
    """
    forget, holdout = (_of("`scores`", scores, key) for key in MIN_K)
    settings = {**forget.settings, **({} if (file := holdout.settings.get("files")) is None else {"holdout": file})}
    return Score.averaged(AUC.set, AUC.metric, above_holdout(forget.rows, holdout.rows), settings=settings)


class Membership(NamedTuple):
    """
    Can the forget rows be told from rows that were never seen?

    auc: of Min-K% beside the oracles' band.
    privleak: in percent.
    """

    auc: Distance
    privleak: float


def membership(auc: Score, oracle_aucs: Sequence[Score]) -> Membership:
    """A model's `min_k_auc` beside those of the oracles."""
    leak = privleak(auc.value, [of_oracle.value for of_oracle in oracle_aucs])
    return Membership(against_oracles(auc, oracle_aucs), leak)


def similarity_gap(scores: Scores, oracles: Sequence[Scores]) -> float:
    """
    Mean over ROUGE-L and BLEU on the forget set of |model - mean of the oracles|, in [0, 1].

    Raises:
        ValueError: there is no oracle, or one of the two is missing of the model or of an oracle.

    References:
        A part of the average similarity gap of Liu et al., "Large Language Model Unlearning via Embedding-Corrupted
        Prompts", arXiv 2406.07933, which has METEOR and BERTScore as well.
    """
    values = ([_of(label, one, key).value for label, one in _all(scores, oracles)] for key in SIMILARITIES)
    return mean(abs(own - mean(of_oracles)) for own, *of_oracles in values)


class Comparison(NamedTuple):
    """A model beside several oracles: every score that they share, forget quality and membership."""

    distances: dict[Key, Distance]
    forget_quality: QualityBesideNull
    membership: Membership


def compare_with_oracles(scores: Scores, oracles: Sequence[Scores]) -> Comparison:
    """
    A model's scores beside those of oracles of different seeds, with truth ratio and Min-K% on `"forget"` and Min-K%
    on `"holdout"` among them.

    Raises:
        ValueError: fewer than two oracles, or a score that is needed and missing.
    """
    every = _all(scores, oracles)
    ratios, *oracle_ratios = ([*_of(label, one, RATIOS).rows] for label, one in every)
    auc, *oracle_aucs = (min_k_auc(Scores(_of(label, one, key) for key in MIN_K)) for label, one in every)
    return Comparison(
        distances(scores, oracles), quality_beside_null(ratios, oracle_ratios), membership(auc, oracle_aucs)
    )


def _all(scores: Scores, oracles: Sequence[Scores]) -> list[tuple[str, Scores]]:
    """The model's scores and then each oracle's, with what messages call them."""
    return [("`scores`", scores), *((f"`oracles[{i}]`", oracle) for i, oracle in enumerate(oracles))]


def _of(label: str, scores: Scores, key: Key) -> Score:
    if key not in scores:
        raise ValueError(f"{label} has no '{key}', which is compared. Measure it with the same metrics as the others.")
    return scores[key]
