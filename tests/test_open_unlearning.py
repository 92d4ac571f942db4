# SPDX-License-Identifier: Apache-2.0
"""open-unlearning's composites beside its code's logic, which `examples/studies/open_unlearning.py` restates."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import make_llama
from made_up_benchmark import save
from scipy.stats import hmean

from alter_peft.evaluation import Key, ModelOnSet, Pair, Score, Scores, measure
from alter_peft.evaluation.open_unlearning import (
    MEM,
    MEM_PARTS,
    OVERALL,
    PRIV,
    PRIV_PARTS,
    UTIL,
    attack_aucs,
    composites,
    memorization_parts,
    privacy_parts,
)
from alter_peft.evaluation.tables import value_text
from alter_peft.evaluation.tasks.tofu import MODEL_UTILITY, TOFU_METRICS
from alter_peft.report.composite_table import composite_table
from alter_peft.report.reading import read_benchmark


FORGET = [
    Pair("Where does Alice live?", "Alice lives in Paris.", ("Bob lives in Paris.", "Far."), "In Paris, she is."),
    Pair("Who bakes?", "Bob bakes the bread.", ("Alice bakes.", "Bees do, daily."), "It is Bob."),
    Pair("What is the budget?", "Seven million.", ("Eight million.", "None at all."), "The budget is seven million."),
    Pair("What do bees make?", "Honey.", ("Bread and rye.", "Wax."), "Bees make honey."),
]
HOLDOUT = [Pair(f"What colour is the {thing}?", f"The {thing} is blue.") for thing in ("sky", "bridge", "bread")]


# ---- their code's logic ---------------------------------------------------------------------------------------------


STUDY = Path(__file__).parents[1] / "examples" / "studies" / "open_unlearning.py"
theirs: Any = ModuleType("open_unlearning_study")
exec(compile(STUDY.read_text(), str(STUDY), "exec"), vars(theirs))


def their_privleak(auc, retain_auc):
    score, reference = 1 - auc, 1 - retain_auc
    return (score - reference) / (reference + 1e-10) * 100


# ---- ours beside it -------------------------------------------------------------------------------------------------


def scored(model, tokenizer, utility=0.5):
    found = Scores([Score(*MODEL_UTILITY[:2], utility, average="other")])
    for name, pairs in (("forget", FORGET), ("holdout", HOLDOUT)):
        found.add(measure(ModelOnSet(model, tokenizer, name, pairs, name == "forget"), TOFU_METRICS[name]))
    return found


@pytest.fixture(scope="module")
def models(tokenizer):
    """A model that half knows the forget answers, so that no part is at its limit, and two that never saw them."""
    model = make_llama(len(tokenizer))
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}],
            return_dict=False, return_tensors="pt",
        )
        for pair in (*FORGET, *(pair._replace(completion=pair.rephrased) for pair in FORGET))
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(12):
        for ids in rows:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), make_llama(len(tokenizer), seed=2), make_llama(len(tokenizer), seed=6)


@pytest.fixture(scope="module")
def measured(models, tokenizer):
    return [scored(model, tokenizer, utility) for model, utility in zip(models, (0.4, 0.5, 0.6), strict=True)]


def test_memorization_is_that_of_their_logic(models, measured, tokenizer):
    found = theirs.their_memorization(models[0], tokenizer, FORGET)
    assert all(0.05 < value < 0.95 for value in found.values())  # each of them has a say
    assert memorization_parts(measured[0]) == pytest.approx(found, rel=1e-4)
    assert Scores(composites(measured[0]))[MEM].value == pytest.approx(hmean([*found.values()]), rel=1e-4)


def test_the_attacks_are_those_of_their_logic(models, measured, tokenizer):
    for model, scores in zip(models, measured, strict=True):
        found = theirs.their_aucs(model, tokenizer, FORGET, HOLDOUT)
        assert attack_aucs(scores) == pytest.approx({name: 1 - auc for name, auc in found.items()}, abs=1e-6)
    answers = [theirs.Reference(models[0], tokenizer, pair.prompt, pair.completion) for pair in FORGET]
    for name, attribute in theirs.ATTACKS.items():  # and row by row
        rows = [getattr(answer, attribute) for answer in answers]
        assert measured[0][Key("forget", PRIV_PARTS[name])].rows == pytest.approx(rows, rel=1e-3, abs=1e-4)


def test_privacy_is_made_of_their_privleak(models, measured, tokenizer):
    """One retain model, as theirs; of several the mean AUC is the level."""
    own, retain = (theirs.their_aucs(model, tokenizer, FORGET, HOLDOUT) for model in models[:2])
    parts = {name: max(0.0, 1 - abs(their_privleak(own[name], retain[name])) / 100) for name in theirs.ATTACKS}
    aucs = [attack_aucs(scores) for scores in measured]
    assert privacy_parts(aucs[0], aucs[1:2]) == pytest.approx(parts, abs=1e-6)
    found = Scores(composites(measured[0], measured[1:2]))
    assert found[PRIV].value == pytest.approx(hmean([*parts.values()]), abs=1e-6)
    assert found[PRIV].settings["oracles"] == 1
    assert Scores(composites(measured[1], measured[1:2]))[PRIV].value == 1.0  # the oracle itself


def test_privacy_limits():
    half = dict.fromkeys(PRIV_PARTS, 0.5)
    assert privacy_parts(dict.fromkeys(PRIV_PARTS, 0.0), [half]) == dict.fromkeys(PRIV_PARTS, 0.0)  # memorised
    assert privacy_parts(dict.fromkeys(PRIV_PARTS, 1.0), [half]) == dict.fromkeys(PRIV_PARTS, 0.0)  # overshot
    assert privacy_parts(dict.fromkeys(PRIV_PARTS, 0.4), [half])["LOSS"] == pytest.approx(0.8)
    levels = [dict.fromkeys(PRIV_PARTS, 0.4), dict.fromkeys(PRIV_PARTS, 0.6)]
    assert privacy_parts(half, levels) == pytest.approx(dict.fromkeys(PRIV_PARTS, 1.0))


def test_utility_and_the_mean_of_the_three(measured):
    found = Scores(composites(measured[0], measured[1:], target=measured[1]))
    assert list(found) == [MEM, PRIV, UTIL, OVERALL]
    assert found[UTIL].value == pytest.approx(0.4 / 0.5)
    assert found[OVERALL].value == pytest.approx(hmean([found[key].value for key in (MEM, PRIV, UTIL)]))


def test_a_composite_without_its_parts_is_left_out(measured):
    def without(*metrics):
        return Scores(score for score in measured[0].values() if score.metric not in metrics)

    for key in MEM_PARTS.values():
        assert MEM not in Scores(composites(without(key.metric)))
    for metric in PRIV_PARTS.values():
        assert PRIV not in Scores(composites(without(metric), measured[1:]))
        assert PRIV not in Scores(composites(measured[0], [measured[1], without(metric)]))
    assert composites(Scores()) == [] and list(Scores(composites(measured[0]))) == [MEM]
    assert UTIL not in Scores(composites(without("model_utility"), target=measured[1]))


def test_an_oracle_whose_auc_is_zero_has_no_privacy_to_compare_with(measured):
    known = Scores(
        Score.averaged(score.set, score.metric, [-100.0 * (score.set == "forget")] * len(score.rows))
        for score in measured[1].values()
        if score.rows
    )
    assert PRIV not in Scores(composites(measured[0], [known]))


# ---- in a report ----------------------------------------------------------------------------------------------------


def test_the_report_has_them_for_each_model(measured, tmp_path):
    for name, seed, scores in (
        ("target", 0, measured[0]),
        ("oracle", 0, measured[1]),
        ("oracle", 1, measured[2]),
        ("oracle", 2, measured[1]),
        ("mine", 0, measured[0]),
        ("other", 0, Scores(score for score in measured[0].values() if score.metric != "truth_share")),
    ):
        save(tmp_path, name, seed, scores=scores.values())
    benchmark = read_benchmark(tmp_path)
    table = composite_table(benchmark)
    names = [name.partition(" [")[0] for name in table.columns]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in table.rows}
    found = Scores(composites(measured[0], [measured[1], measured[2], measured[1]], measured[0]))
    for key in (MEM, PRIV, UTIL, OVERALL):
        assert rows["mine"][key.metric] == value_text(found[key].value), key
    assert rows["mine"]["1 - EM"] == value_text(memorization_parts(measured[0])["1 - EM"])
    assert rows["other"][MEM.metric] == rows["other"][OVERALL.metric] == "" != rows["other"][PRIV.metric]
    assert [note.partition(":")[0] for note in table.notes] == [key.metric for key in (MEM, PRIV, UTIL, OVERALL)]
    # and no distance is taken of what they are made of
    assert {key.metric for key in benchmark.bands} == {"probability", "rouge", "truth_ratio", "exact_memorization",
        "extraction_strength", "min_k", "membership_auc", "model_utility"}  # fmt: skip
