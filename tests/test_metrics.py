# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import gmean, ks_2samp, mannwhitneyu

from alter_peft.evaluation.metrics.membership import above_holdout, min_k, min_k_plus_plus, privleak
from alter_peft.evaluation.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    floored_extraction_strength,
)
from alter_peft.evaluation.metrics.text import rouge_l, unique_tokens
from alter_peft.evaluation.metrics.truth_ratio import forget_quality, truth_ratio, truth_share
from alter_peft.evaluation.scores import Score
from alter_peft.evaluation.tasks.tofu import model_utility
from alter_peft.evaluation.z_scores import z_scores


def near_one(ratios) -> float:
    """TOFU's truth ratio on forget sets: 1 where true and false answers are equally likely."""
    return Score.averaged("forget", "truth_ratio", list(ratios), "near_one").value


def truthfulness(ratios) -> float:
    """And on all other sets: 1 where the true answer is far likelier."""
    return Score.averaged("retain", "truth_ratio", list(ratios), "truthfulness").value


def tokens(*rows: str) -> list[torch.Tensor]:
    """`"++-"`: two tokens that the model would have said itself, and one that it would not."""
    return [torch.tensor([sign == "+" for sign in row]) for row in rows]


# ---- memorisation ---------------------------------------------------------------------------------------------------


def test_exact_memorization_by_hand():
    assert exact_memorization(tokens("++-+", "----", "++"), [4, 4, 2]) == [0.75, 0.0, 1.0]


def test_extraction_strength_by_hand():
    """1 - k / n: k tokens must be given before all others follow."""
    rows = tokens("++++", "-+++", "+-++", "++-+", "+++-", "----")
    assert extraction_strength(rows, [4] * 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_extraction_strength_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(7, generator=generator) < 0.8 for _ in range(30)]
    expected = [1 - min(k for k in range(8) if row[k:].all()) / 7 for row in rows]
    assert len(set(expected)) > 3
    assert extraction_strength(rows, [7] * 30) == pytest.approx(expected)


def test_extraction_strength_beside_open_unlearning():
    """Their loop over k ends at n - 1, so that an answer whose last token is wrong keeps 1 / n."""
    for row in tokens("+-++", "----", "+++-"):
        theirs = 1 - next((k for k in range(4) if row[k:].all()), 3) / 4
        ours = extraction_strength([row], [4])[0]
        assert ours == (theirs if row[-1] else theirs - 0.25)


def test_floored_extraction_strength_is_open_unlearnings_loop():
    for row in tokens("+-++", "----", "+++-", "++++", "---+"):
        theirs = 1 - next((k for k in range(4) if row[k:].all()), 3) / 4
        assert floored_extraction_strength([row], [4]) == [theirs]


@pytest.mark.parametrize("metric", [exact_memorization, extraction_strength])
def test_the_end_of_the_turn_does_not_count(metric):
    assert metric(tokens("++-", "--+"), [2, 2]) == [1.0, 0.0]


@pytest.mark.parametrize("metric", [exact_memorization, extraction_strength, min_k])
def test_an_answer_without_text_is_refused(metric):
    with pytest.raises(ValueError, match="Answer 1 has no text"):
        metric([torch.zeros(2), torch.zeros(1)], [2, 0])


# ---- membership -----------------------------------------------------------------------------------------------------


def test_min_k_by_hand():
    row = torch.tensor([-1.0, -9.0, -2.0, -0.5, -3.0, -100.0])
    assert min_k([row], [5]) == [6.0]  # 0.4 of 5 tokens: -9 and -3
    assert min_k([row], [5], k=1.0) == pytest.approx([3.1])
    assert min_k([row], [4]) == [9.0]  # 1.6 tokens are one
    assert min_k([row], [1]) == [1.0]  # 0.4 tokens are one, too


def test_min_k_is_the_papers_loop():
    """arXiv 2310.16789: sort, keep int(k n), minus their mean."""
    rows = torch.randn(20, 13, generator=torch.Generator().manual_seed(0))
    expected = [-np.mean(np.sort(row.numpy())[: int(0.2 * 13)]) for row in rows]
    assert min_k(list(rows), [13] * 20, k=0.2) == pytest.approx(expected, rel=1e-5)


def test_z_scores_by_hand():
    """p = (1/2, 1/4, 1/4): ln p is -ln 2 half of the time, else -2 ln 2; mean -1.5 ln 2, deviation .5 ln 2."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).mul(math.log(2)).repeat(3, 1)
    assert z_scores(logits, torch.tensor([0, 1, 2])).tolist() == pytest.approx([1.0, -1.0, -1.0], abs=1e-5)
    uniform, sure = torch.zeros(1, 4), torch.tensor([[0.0, -math.inf]])
    assert z_scores(uniform, torch.tensor([3])).tolist() == pytest.approx([0.0], abs=1e-3)  # all tokens are alike
    assert z_scores(sure, torch.tensor([0])).tolist() == [0.0]


def test_min_k_plus_plus_by_hand():
    assert min_k_plus_plus([torch.tensor([1.0, -3.0, 0.5, -1.0, 0.0, -9.0])], [5]) == [2.0]  # -3 and -1 of five


def auc(forget, holdout):
    return np.mean(above_holdout(forget, holdout))


def test_membership_auc_is_the_probability_of_a_higher_score():
    generator = np.random.default_rng(0)
    forget, holdout = generator.normal(size=30).round(1), generator.normal(0.5, size=20).round(1)  # with ties
    pairs = [(f > h) + 0.5 * (f == h) for f in forget for h in holdout]
    assert auc(forget, holdout) == pytest.approx(np.mean(pairs))
    assert auc(forget, holdout) == pytest.approx(mannwhitneyu(forget, holdout).statistic / 600)


def test_membership_limits():
    known, unknown = [0.1, 0.2, 0.3], [3.0, 4.0]  # Min-K%: low for what was seen in training
    assert auc(known, unknown) == 0.0
    assert auc(unknown, known) == 1.0
    assert auc(known, known) == 0.5


def test_privleak_limits():
    assert privleak(0.0, [0.5]) == -100.0  # memorised
    assert privleak(0.5, [0.5]) == 0.0  # the oracle
    assert privleak(1.0, [0.5]) == 100.0  # forgotten more than what was never seen
    assert privleak(0.6, [0.4]) == pytest.approx(50.0)


def test_membership_without_rows_or_level():
    with pytest.raises(ValueError, match="`holdout` is empty"):
        auc([1.0], [])
    with pytest.raises(ValueError, match="`oracle_auc` is 0"):
        privleak(0.5, [0.0])


# ---- truth ----------------------------------------------------------------------------------------------------------


def test_truth_ratio_is_geometric():
    true, false = [0.5, 0.02], [[0.1, 0.4, 0.2], [0.9, 0.001]]
    expected = [gmean(wrong) / right for right, wrong in zip(true, false, strict=True)]
    found = truth_ratio([math.log(p) for p in true], [[math.log(p) for p in wrong] for wrong in false])
    assert found == pytest.approx(expected)
    assert found[0] == pytest.approx(0.4)


def test_truth_share_by_hand():
    """True answer .3, false ones .1 and .4: their geometric mean is .2, and .3 / .5 is .6 (and 1 / (1 + R))."""
    assert truth_share([math.log(0.3)], [[math.log(0.1), math.log(0.4)]]) == pytest.approx([0.6])
    assert truth_share([0.0, -2000.0], [[-2000.0], [0.0]]) == pytest.approx([1.0, 0.0])  # finite for any model


def test_truth_ratio_of_a_destroyed_model_is_finite():
    low, high = truth_ratio([-1.0, -2000.0], [[-2000.0], [-1.0]])
    assert 0 < low < 1e-300 and 1e300 < high < math.inf
    assert near_one([low, high]) == pytest.approx(0) and truthfulness([low, high]) == pytest.approx(0.5)


def test_truth_scores_by_hand():
    assert near_one([1.0]) == 1.0
    assert near_one([0.5, 2.0, 4.0]) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert near_one([0.0]) == 0.0
    assert truthfulness([0.25, 1.0, 7.0]) == pytest.approx(0.25)
    assert math.isnan(truthfulness([0.25, math.nan])) and math.isnan(near_one([math.nan, 1.0]))


def test_forget_quality_is_scipys_test():
    generator = np.random.default_rng(0)
    own, oracle = np.exp(generator.normal(size=40)), np.exp(generator.normal(0.7, size=40))
    found, expected = forget_quality(own, oracle), ks_2samp(own, oracle)
    assert found == (expected.statistic, expected.pvalue)
    assert found == pytest.approx(forget_quality(1 / own, 1 / oracle))
    assert forget_quality(own, own) == (0.0, 1.0)
    with pytest.raises(ValueError, match="`oracle_ratios` is empty"):
        forget_quality(own, [])


def test_of_independent_samples_the_p_value_is_uniform():
    """Why p > .05 alone is no success: it is as often above .5 as below."""
    generator = np.random.default_rng(0)
    pvalues = np.array([forget_quality(*generator.normal(size=(2, 200))).pvalue for _ in range(400)])
    assert [np.mean(pvalues <= level) for level in (0.05, 0.5)] == pytest.approx([0.05, 0.5], abs=0.08)


def test_of_the_same_questions_the_p_value_is_not_uniform():
    """Two oracles: what a question gives both makes the test conservative, so that p > .05 is weaker evidence yet."""
    generator = np.random.default_rng(0)
    questions, seeds = generator.normal(size=(400, 1, 40)), generator.normal(size=(400, 2, 40))
    models = math.sqrt(0.9) * questions + math.sqrt(0.1) * seeds
    assert np.corrcoef(models[:, 0].ravel(), models[:, 1].ravel())[0, 1] == pytest.approx(0.9, abs=0.01)
    pvalues = np.array([forget_quality(*pair).pvalue for pair in models])
    assert np.mean(pvalues < 0.05) == 0 and np.median(pvalues) > 0.9


def test_model_utility_by_hand():
    assert model_utility([0.5] * 8 + [0.25]) == pytest.approx(9 / (8 * 2 + 4))
    assert model_utility([0.5] * 8 + [0.0]) == 0.0
    with pytest.raises(ValueError, match="`scores` has 8 values"):
        model_utility([0.5] * 8)


# ---- published logs -------------------------------------------------------------------------------------------------


LOGS = Path(__file__).parents[2] / "shared" / "data" / "openunlearning" / "openunlearning_reference.json.gz"
MODELS = ("Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Llama-2-7b-chat-hf")


@pytest.fixture(scope="module")
def published() -> dict:
    """Open-unlearning's logs of four models, each trained on all of TOFU and on all but a forget set."""
    if not LOGS.is_file():
        pytest.skip(f"no logs at {LOGS}")
    with gzip.open(LOGS) as file:
        return json.load(file)


@pytest.fixture(params=[(model, percent) for model in MODELS for percent in ("01", "05", "10")], ids="-".join)
def logs(request, published) -> tuple[dict, dict]:
    """The logs of a finetuned model and of its oracle."""
    model, percent = request.param
    return published[f"{model}/full_forget{percent}"], published[f"{model}/retain{100 - int(percent)}"]


def test_published_forget_quality(logs):
    finetuned, oracle = logs
    found = forget_quality(finetuned["forget_truth_ratio"], oracle["forget_truth_ratio"])
    assert found.pvalue == pytest.approx(finetuned["agg"]["forget_quality"], rel=1e-6)
    theirs = [[1 / (ratio + 1e-10) for ratio in part["forget_truth_ratio"]] for part in logs]
    assert found == pytest.approx(forget_quality(*theirs), rel=1e-12)


def test_published_truth_ratio(logs):
    for log in logs:
        assert near_one(log["forget_truth_ratio"]) == pytest.approx(log["agg"]["forget_truth_ratio"], rel=1e-8)


def test_published_model_utility(logs):
    metrics = {
        "retain": ("Q_A_Prob", "Q_A_ROUGE", "Truth_Ratio"),
        "ra": ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio"),
        "wf": ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio"),
    }
    for log in logs:
        nine = [log["agg"][f"{name}_{metric}"] for name in metrics for metric in metrics[name]]
        assert model_utility(nine) == pytest.approx(log["agg"]["model_utility"], rel=1e-12)


def test_published_privleak(logs):
    """They log 1 - AUC. The oracle itself is compared with .5; a finetuned model is about -100."""
    finetuned, oracle = (1 - log["agg"]["mia_min_k"] for log in logs)
    assert privleak(finetuned, [oracle]) == pytest.approx(logs[0]["agg"]["privleak"], rel=1e-6)
    assert privleak(oracle, [0.5]) == pytest.approx(logs[1]["agg"]["privleak"], rel=1e-6, abs=1e-6)
    assert -100 <= privleak(finetuned, [oracle]) < -99


# ---- answers --------------------------------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    """The longest common subsequence of words, over those of the reference (recall) or of the answer (precision)."""
    answer, reference = ["Bob quickly bakes rye bread"], ["Bob bakes bread with honey every morning"]
    assert rouge_l(answer, reference) == pytest.approx([3 / 7])
    assert rouge_l(answer, reference, "precision") == pytest.approx([3 / 5])
    assert rouge_l(answer, reference, "fmeasure") == pytest.approx([2 * (3 / 5) * (3 / 7) / (3 / 5 + 3 / 7)])


def test_rouge_l_limits():
    assert rouge_l(["The sky is blue.", "", "Seven"], ["the sky is BLUE", "Bob", "Bob"]) == [1.0, 0.0, 0.0]


def test_rouge_l_stems_words_unless_told_otherwise():
    assert rouge_l(["baking breads"], ["baked bread"]) == [1.0]
    assert rouge_l(["baking breads"], ["baked bread"], use_stemmer=False) == [0.0]


def test_rouge_l_of_an_unknown_kind():
    with pytest.raises(ValueError, match=r"`kind` is 'f1', but must be one of \['precision', 'recall', 'fmeasure'\]"):
        rouge_l(["Bob"], ["Bob"], "f1")


def test_unique_tokens_by_hand():
    answers = ["The sky is the sky.", "no no No NO", "every word differs", "", "  "]
    assert unique_tokens(answers) == [0.8, 0.25, 1.0, 0.0, 0.0]
