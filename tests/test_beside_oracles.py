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

from itertools import combinations

import pytest
from made_up_benchmark import MIN_K, RATIOS, make_benchmark, save, scores

from alter_peft.evaluation.beside_oracles import privacy_leaks, similarity_gaps, truth_ratio_tests
from alter_peft.evaluation.metrics import forget_quality, membership_auc
from alter_peft.evaluation.summary import read_benchmark


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def models(folder):
    benchmark = read_benchmark(folder)
    return {model.name: model for model in benchmark.models}, benchmark.oracle


def shifted(values, shift):
    return [value + shift for value in values]


def test_each_seed_against_each_oracle(folder):
    found, oracle = models(folder)
    of_oracles = [shifted(RATIOS, step) for step in (-0.01, 0.0, 0.01)]
    assert truth_ratio_tests(found["lora"], oracle) == [
        forget_quality(shifted(RATIOS, 0.4), ratios) for ratios in of_oracles
    ]
    assert len(truth_ratio_tests(found["alter"], oracle)) == 6
    assert truth_ratio_tests(oracle, oracle) == [forget_quality(*pair) for pair in combinations(of_oracles, 2)]


def test_a_cell_without_truth_ratios_is_left_out(folder):
    save(folder, "alter", 0, scores=scores(0.1, 0.5), without=["forget/truth_ratio"])
    found, oracle = models(folder)
    assert len(truth_ratio_tests(found["alter"], oracle)) == 3


def test_leaks_are_of_the_oracles_mean_auc(folder):
    found, oracle = models(folder)
    aucs = [membership_auc(shifted(MIN_K, 10 * step), MIN_K) for step in (-0.01, 0.0, 0.01)]
    level = sum(aucs) / 3
    assert privacy_leaks(found["target"], oracle) == pytest.approx([100 * (0.5 / 16 - level) / level])
    others = (aucs[1] + aucs[2]) / 2
    assert privacy_leaks(oracle, oracle)[0] == pytest.approx(100 * (aucs[0] - others) / others)


def test_similarity_gap_is_two_sided(folder):
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        save(folder, "oracle", seed, scores=scores(value, 0.5, value, forget__rouge=value, forget__bleu=value / 2))
    save(folder, "alter", 0, scores=scores(0.1, 0.5, forget__rouge=0.1, forget__bleu=0.2))
    save(folder, "alter", 1, scores=scores(0.1, 0.5, forget__rouge=0.2, forget__bleu=0.1))
    found, oracle = models(folder)
    assert similarity_gaps(found["alter"], oracle) == pytest.approx([0.1, 0.0])
    assert similarity_gaps(oracle, oracle) == pytest.approx([0.1125, 0.0, 0.1125])
    assert similarity_gaps(found["lora"], oracle) == []
