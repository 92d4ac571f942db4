# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from alter_peft.evaluation import Band, Key, Score, Scores, band, compare_with_oracles, distances
from alter_peft.evaluation.metrics.membership import privleak
from alter_peft.evaluation.metrics.truth_ratio import forget_quality
from alter_peft.evaluation.oracle import (
    COMPARED,
    RATIOS,
    band_of,
    cutoff,
    leave_one_out,
    membership,
    min_k_auc,
    quality_beside_null,
    similarity_gap,
)


def measured(seed: int, known: float = 0.0) -> Scores:
    """Scores of a model; `known` moves its truth ratios and its Min-K% of the forget set away from an oracle's."""
    generator = np.random.default_rng(seed)
    rows = {
        ("forget", "truth_ratio"): np.exp(generator.normal(-known, size=40)),
        ("forget", "min_k"): generator.normal(5 - known, size=40),
        ("holdout", "min_k"): generator.normal(5, size=40),
        ("forget", "probability"): generator.uniform(0.1, 0.2, size=40) + known,
    }
    return Scores(Score.averaged(*key, values.tolist()) for key, values in rows.items())


def plain(**values: float) -> Scores:
    """Scores without rows of the set `a`."""
    return Scores(Score("a", metric, value, average="other") for metric, value in values.items())


ROUGE, MIN = Key("a", "rouge"), Key("a", "min_k")


ORACLES = [measured(seed) for seed in (1, 2, 3)]


# ---- band -----------------------------------------------------------------------------------------------------------


def test_band_by_hand():
    found = band([1.0, 2.0, 3.0])
    assert found == Band(2.0, 1.0)
    assert [found.distance(value) for value in (2.0, 3.0, 1.5, 0.0)] == [0.0, 1.0, -0.5, -2.0]


def test_band_is_numpys_sample_deviation():
    values = np.random.default_rng(0).normal(size=5)
    assert band(values.tolist()) == pytest.approx((values.mean(), values.std(ddof=1)))


def test_oracles_that_agree_exactly():
    found = band([0.5, 0.5])
    assert [found.distance(value) for value in (0.5, 0.6, 0.4)] == [0.0, math.inf, -math.inf]


def test_rows_of_which_a_seed_moves_each_by_itself():
    """The oracles' means agree by chance, their rows do not."""
    rows = [[0.1, 0.5], [0.3, 0.3]]  # variances .02, .02; over two rows their mean has a variance of .01
    assert band([0.3, 0.3], rows) == pytest.approx((0.3, 0.1))
    assert band([0.3, 0.7], rows) == pytest.approx((0.5, 0.4 / math.sqrt(2)))  # more than the rows say


def test_questions_that_differ_do_not_widen_the_unit():
    rows = [[0.0, 1.0, 0.5, 0.02], [0.0, 1.0, 0.5, 0.0]]
    assert band([np.mean(row) for row in rows], rows).spread == pytest.approx(0.005 / math.sqrt(2))


@pytest.mark.parametrize("oracles", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.2, 0.7])  # the mean of three times .1 is no .1 in float64
def test_oracles_that_agree_in_every_row(oracles, value):
    """As if one row of one of them had come out otherwise by 1."""
    found = band([value] * oracles, [[value] * 40] * oracles)
    one_other = [[value] * 40] * (oracles - 1) + [[value + 1] + [value] * 39]
    assert found.spread == pytest.approx(band([np.mean(rows) for rows in one_other], one_other).spread)
    assert found.distance(value + 0.9) == pytest.approx(36 * math.sqrt(oracles))
    assert found.distance(value) == 0


def test_the_unit_of_rows_makes_agreement_by_chance_harmless():
    """One more true oracle of three; the largest of 26 distances, as simulated in float64."""
    generator = np.random.default_rng(0)
    largest = {"values": [], "rows": []}
    for _ in range(200):
        found = {"values": [], "rows": []}
        for _ in range(26):
            rows = generator.normal(size=(4, 40))
            values = rows.mean(axis=1)
            found["values"].append(abs(band(values[:3]).distance(values[3])))
            found["rows"].append(abs(band(values[:3], rows[:3]).distance(values[3])))
        for kind, distances_ in found.items():
            largest[kind].append(max(distances_))
    assert np.median(largest["values"]) > 5.5 and np.median(largest["rows"]) < 3


def test_rows_of_other_questions():
    with pytest.raises(ValueError, match=r"The oracles have \[1, 2\] rows of one score"):
        band([0.0, 0.0], [[0.0], [0.0, 0.0]])


def test_what_the_rows_of_a_truth_ratio_add():
    """Rows are R, but the score is the mean of min(R, 1 / R) or of max(0, 1 - R)."""
    rows = [[0.5, 4.0], [2.0, 2.0]]
    for average, parts in (("near_one", [[0.5, 0.25], [0.5, 0.5]]), ("truthfulness", [[0.5, 0.0], [0.0, 0.0]])):
        scores = [Score.averaged("forget", "truth_ratio", ratios, average) for ratios in rows]
        assert [score.value for score in scores] == [np.mean(part) for part in parts]
        assert band_of(scores) == band([score.value for score in scores], parts)


def test_rows_that_a_score_is_no_mean_of():
    """How many there are counts alone, and only where the oracles agree."""
    scores = [Score("a", "best", 0.5, rows, "other") for rows in ([3.0, 8.0, 1.0, 2.0], [9.0, 1.0, 4.0, 4.0])]
    assert band_of(scores).spread == pytest.approx(1 / (4 * math.sqrt(2)))
    other = [scores[0], Score("a", "best", 0.6, scores[1].rows, "other")]
    assert band_of(other) == pytest.approx(band([0.5, 0.6]))


def test_rows_that_one_oracle_lacks():
    scores = [Score("a", "rouge", 0.3, [0.1, 0.5]), Score("a", "rouge", 0.3, [0.3, 0.3]), Score("a", "rouge", 0.4)]
    assert band_of(scores) == band([0.3, 0.3, 0.4])


def test_scores_without_rows():
    def of(*values):
        return [Score("utility", "model_utility", value, average="other") for value in values]

    assert band_of(of(0.1, 0.3)) == band([0.1, 0.3])
    assert band_of(of(0.0, 0.0)).distance(0.1) == math.inf


def test_cutoff_is_that_of_a_simulation():
    generator = np.random.default_rng(0)
    for oracles, expected in ((2, 15.56), (3, 4.97), (5, 3.04)):
        assert cutoff(oracles) == pytest.approx(expected, abs=0.01)
        values = generator.normal(size=(40000, oracles))
        distance = (generator.normal(size=40000) - values.mean(axis=1)) / values.std(axis=1, ddof=1)
        assert np.mean(np.abs(distance) > cutoff(oracles)) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_a_band_needs_two_oracles(values):
    with pytest.raises(ValueError, match=f"There are {len(values)} oracles, but a band needs at least 2"):
        band(values)


# ---- distances ------------------------------------------------------------------------------------------------------


def test_distances_of_every_score_that_oracles_have():
    scores, oracles = (
        plain(rouge=0.9, min_k=3.0, astray=0.1),
        [plain(rouge=value, min_k=10 * value) for value in (0.1, 0.2, 0.3)],
    )
    found = distances(scores, oracles)
    assert list(found) == [ROUGE, MIN]  # an oracle has nothing to send astray
    assert found[ROUGE].band == pytest.approx((0.2, 0.1)) and found[ROUGE].value == 0.9
    assert [distance.distance for distance in found.values()] == pytest.approx([7.0, 1.0])


def test_two_sided():
    oracles = [plain(rouge=value) for value in (0.4, 0.5, 0.6)]
    above, below = (distances(plain(rouge=value), oracles)[ROUGE].distance for value in (0.7, 0.3))
    assert above == pytest.approx(-below) and above == pytest.approx(2.0)


def test_a_score_that_one_model_lacks():
    one, both = plain(rouge=0.4), plain(rouge=0.4, min_k=3.0)
    with pytest.raises(ValueError, match=r"`scores` has no 'a/min_k'"):
        distances(one, [both, both])
    with pytest.raises(ValueError, match=r"`oracles\[1\]` has no 'a/min_k'"):
        distances(both, [both, one])


def test_each_oracle_beside_the_others():
    oracles = [plain(rouge=value) for value in (1.0, 2.0, 6.0)]
    beside = ((1 - 4, [2, 6]), (2 - 3.5, [1, 6]), (6 - 1.5, [1, 2]))
    expected = [difference / np.std(two, ddof=1) for difference, two in beside]
    assert [found[ROUGE] for found in leave_one_out(oracles)] == pytest.approx(expected)
    assert leave_one_out(oracles[:2]) == []  # one has no spread


# ---- forget quality -------------------------------------------------------------------------------------------------


def test_forget_quality_beside_that_of_two_oracles():
    own, oracles = measured(9, known=1.0), ORACLES
    ratios, others = own[RATIOS].rows, [oracle[RATIOS].rows for oracle in oracles]
    tests, null = [forget_quality(ratios, o) for o in others], [forget_quality(*p) for p in combinations(others, 2)]
    found = quality_beside_null(ratios, others)
    for field, values in (
        ("statistic", [test.statistic for test in tests]),
        ("pvalue", [test.pvalue for test in tests]),
        ("null_statistic", [test.statistic for test in null]),
        ("null_pvalue", [test.pvalue for test in null]),
    ):
        assert len(values) == 3
        assert getattr(found, field) == (np.median(values), min(values), max(values)), field
    assert found.statistic.lowest > found.null_statistic.highest  # it knows the forget set


def test_forget_quality_needs_two_oracles():
    with pytest.raises(ValueError, match="There are 1 oracles, but forget quality is read beside that of two"):
        quality_beside_null([1.0], [[1.0]])


# ---- membership -----------------------------------------------------------------------------------------------------


def test_membership_by_hand():
    own, *oracles = (Score("forget", "membership_auc", value) for value in (0.25, 0.4, 0.5, 0.6))
    found = membership(own, oracles)
    assert found.auc.band == pytest.approx((0.5, 0.1)) and found.auc.distance == pytest.approx(-2.5)
    assert found.privleak == pytest.approx(-50.0)


def test_privleak_is_of_the_oracles_mean_auc():
    assert privleak(0.75, [0.4, 0.6]) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="`oracle_auc` is 0"):
        privleak(0.5, [0.0, 0.0])


def test_rows_of_the_auc_are_the_holdout_below_each_forget_row():
    files = ({"files": ["f.jsonl"]}, {"files": ["h.jsonl"]})
    forget = Score.averaged("forget", "min_k", [1.0, 2.0, 4.0], settings=files[0])
    holdout = Score.averaged("holdout", "min_k", [1.0, 3.0, 2.0, 5.0], settings=files[1])
    found = min_k_auc(Scores([forget, holdout]))
    assert found.rows == [0.125, 0.375, 0.75] and found.value == pytest.approx(np.mean(found.rows))
    assert found.key == Key("forget", "membership_auc")
    assert found.settings == {"files": ["f.jsonl"], "holdout": ["h.jsonl"]}
    with pytest.raises(ValueError, match="`scores` has no 'holdout/min_k'"):
        min_k_auc(Scores([forget]))


# ---- similarity gap -------------------------------------------------------------------------------------------------


def test_similarity_gap_is_two_sided():
    def model(**values):
        return Scores(Score("forget", metric, value) for metric, value in values.items())

    oracles = [model(rouge_f=0.1, bleu=0.05), model(rouge_f=0.3, bleu=0.15)]  # .2, .1
    assert similarity_gap(model(rouge_f=0.1, bleu=0.2), oracles) == pytest.approx(0.1)
    assert similarity_gap(model(rouge_f=0.2, bleu=0.1), oracles) == pytest.approx(0.0)
    with pytest.raises(ValueError, match=r"`oracles\[0\]` has no 'forget/bleu'"):
        similarity_gap(model(rouge_f=0.1, bleu=0.1), [model(rouge_f=0.1)])


# ---- all together ---------------------------------------------------------------------------------------------------


def test_a_model_beside_its_oracles():
    own = measured(9, known=20.0)
    found = compare_with_oracles(own, ORACLES)
    assert found.distances == distances(own, ORACLES)
    ratios = [oracle[RATIOS].rows for oracle in ORACLES]
    assert found.forget_quality == quality_beside_null(own[RATIOS].rows, ratios)
    assert found.membership == membership(min_k_auc(own), list(map(min_k_auc, ORACLES)))
    assert found.membership.privleak == -100.0


def test_an_oracle_of_another_seed_is_near():
    found = compare_with_oracles(measured(9), ORACLES)
    assert abs(found.membership.privleak) < 40
    assert found.forget_quality.pvalue.median > 0.05


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_needed_and_missing(name):
    def without(scores):
        return Scores(score for key, score in scores.items() if key != name)

    with pytest.raises(ValueError, match=f"`scores` has no '{name}'"):
        compare_with_oracles(without(measured(9)), ORACLES)
    lame = [ORACLES[0], without(ORACLES[1])]
    with pytest.raises(ValueError, match=rf"`oracles\[1\]` has no '{name}'"):
        compare_with_oracles(measured(9), lame)
