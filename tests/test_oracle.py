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
from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from alter_peft.evaluation import Band, Score, band, compare_with_oracles, distances
from alter_peft.evaluation.metrics import forget_quality, membership_auc
from alter_peft.evaluation.oracle import membership, quality_beside_null


def measured(seed: int, known: float = 0.0) -> dict[str, Score]:
    """Scores of a model; `known` moves its truth ratios and its Min-K% of the forget set away from an oracle's."""
    generator = np.random.default_rng(seed)
    rows = {
        "forget/truth_ratio": np.exp(generator.normal(-known, size=40)),
        "forget/min_k": generator.normal(5 - known, size=40),
        "holdout/min_k": generator.normal(5, size=40),
        "forget/probability": generator.uniform(0.1, 0.2, size=40) + known,
    }
    return {name: Score(float(np.mean(values)), values.tolist()) for name, values in rows.items()}


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


@pytest.mark.parametrize("values", [[], [0.5]])
def test_a_band_needs_two_oracles(values):
    with pytest.raises(ValueError, match=f"There are {len(values)} oracles, but a band needs at least 2"):
        band(values)


# ---- distances ------------------------------------------------------------------------------------------------------


def test_distances_of_every_score_that_oracles_have():
    scores = {"a/rouge": Score(0.9, []), "a/min_k": Score(3.0, []), "a/astray": Score(0.1, [])}
    oracles = [{"a/rouge": Score(value, []), "a/min_k": Score(10 * value, [])} for value in (0.1, 0.2, 0.3)]
    found = distances(scores, oracles)
    assert list(found) == ["a/rouge", "a/min_k"]  # an oracle has nothing to send astray
    assert found["a/rouge"].band == pytest.approx((0.2, 0.1)) and found["a/rouge"].value == 0.9
    assert [distance.distance for distance in found.values()] == pytest.approx([7.0, 1.0])


def test_two_sided():
    oracles = [{"a/rouge": Score(value, [])} for value in (0.4, 0.5, 0.6)]
    above, below = (distances({"a/rouge": Score(value, [])}, oracles)["a/rouge"].distance for value in (0.7, 0.3))
    assert above == pytest.approx(-below) and above == pytest.approx(2.0)


def test_a_score_that_one_model_lacks():
    one, other = {"a/rouge": Score(0.4, [])}, {"a/min_k": Score(3.0, [])}
    with pytest.raises(ValueError, match=r"`scores` has no 'a/min_k'"):
        distances(one, [one | other, one | other])
    with pytest.raises(ValueError, match=r"`oracles\[1\]` has no 'a/min_k'"):
        distances(one | other, [one | other, one])


# ---- forget quality -------------------------------------------------------------------------------------------------


def test_forget_quality_beside_that_of_two_oracles():
    own, oracles = measured(9, known=1.0), ORACLES
    ratios, others = own["forget/truth_ratio"].rows, [oracle["forget/truth_ratio"].rows for oracle in oracles]
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
    found = membership(0.25, [0.4, 0.5, 0.6])
    assert found.auc.band == pytest.approx((0.5, 0.1)) and found.auc.distance == pytest.approx(-2.5)
    assert found.privleak == pytest.approx(-50.0)


# ---- all together ---------------------------------------------------------------------------------------------------


def test_a_model_beside_its_oracles():
    own = measured(9, known=20.0)
    found = compare_with_oracles(own, ORACLES)
    assert found.distances == distances(own, ORACLES)
    ratios = [oracle["forget/truth_ratio"].rows for oracle in ORACLES]
    assert found.forget_quality == quality_beside_null(own["forget/truth_ratio"].rows, ratios)
    aucs = [membership_auc(oracle["forget/min_k"].rows, oracle["holdout/min_k"].rows) for oracle in ORACLES]
    assert found.membership == membership(0.0, aucs)
    assert found.membership.privleak == -100.0


def test_an_oracle_of_another_seed_is_near():
    found = compare_with_oracles(measured(9), ORACLES)
    assert abs(found.membership.privleak) < 40
    assert found.forget_quality.pvalue.median > 0.05


@pytest.mark.parametrize("name", ["forget/truth_ratio", "forget/min_k", "holdout/min_k"])
def test_what_is_needed_and_missing(name):
    own = {key: score for key, score in measured(9).items() if key != name}
    with pytest.raises(ValueError, match=f"`scores` has no {name!r}"):
        compare_with_oracles(own, ORACLES)
    lame = [ORACLES[0], {key: score for key, score in ORACLES[1].items() if key != name}]
    with pytest.raises(ValueError, match=rf"`oracles\[1\]` has no {name!r}"):
        compare_with_oracles(measured(9), lame)
