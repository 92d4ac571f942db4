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
"""What takes the rows, or several scores, of a model and of the oracles together."""

from __future__ import annotations

from itertools import combinations, product
from statistics import mean

from .metrics import ForgetQuality, forget_quality, privleak
from .summary import RATIOS, Model


SIMILARITIES = ("forget/rouge", "forget/bleu")


def truth_ratio_tests(model: Model, oracle: Model) -> list[ForgetQuality]:
    """
    The KS test of a model's truth ratios on the forget set against each oracle's, for each of its seeds; of the oracle
    itself, that of each pair.
    """
    pairs = combinations(oracle.results, 2) if model is oracle else product(model.results, oracle.results)
    rows = [[cell.scores[RATIOS].rows for cell in pair if RATIOS in cell.scores] for pair in pairs]
    return [forget_quality(*both) for both in rows if len(both) == 2]


def privacy_leaks(model: Model, oracle: Model) -> list[float]:
    """PrivLeak of each seed against the mean AUC of the oracles; of an oracle, against that of the others."""
    key = "forget/membership_auc"
    found = [_beside(values, oracle, key) for values in model.values]
    return [privleak(*both) for both in found if both is not None]


def similarity_gaps(model: Model, oracle: Model) -> list[float]:
    """
    Mean over ROUGE-L and BLEU on the forget set of |model - mean of the oracles| of each seed; of an oracle, against
    the others.

    A part of the average similarity gap of Liu et al., arXiv 2406.07933, which has METEOR and BERTScore too.
    """
    gaps = []
    for values in model.values:
        beside = [_beside(values, oracle, key) for key in SIMILARITIES]
        found = [abs(both[0] - both[1]) for both in beside if both is not None]
        if len(found) == len(SIMILARITIES):
            gaps.append(mean(found))
    return gaps


def _beside(values: dict[str, float], oracle: Model, key: str) -> tuple[float, float] | None:
    """A number of one cell and its mean over the oracles, itself left out; `None` if either is missing."""
    others = [other[key] for other in oracle.values if other is not values and key in other]
    return (values[key], mean(others)) if key in values and others else None
