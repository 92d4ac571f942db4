# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from made_up_benchmark import MIN_K, scores

from alter_peft.evaluation import Result, Score, compare_with_oracles, comparison
from alter_peft.evaluation.comparison import COMPARED


SETTINGS = {"as_chat": None, "bf16": True, "answered": None, "max_new_tokens": 8, "forget": ["forget"], "sets": []}


def of(found, **settings):
    return Result("m", 0, scores=found, settings={**SETTINGS, **settings})


def score_table(found, oracles=()):
    return comparison.score_table(of(found), [of(one) for one in oracles])


def oracle_table(found, oracles):
    return comparison.oracle_table(of(found), [of(one) for one in oracles])


MODEL = scores(0.1, 0.5, 0.3)
ORACLES = [scores(0.2, 0.5, 0.0), scores(0.4, 0.7, 0.1)]


# ---- score_table ----------------------------------------------------------------------------------------------------


def test_scores_by_themselves():
    table = score_table({"a/probability": Score(0.25, [0.25]), "a/rouge": Score(1.0, [1.0])})
    assert table.columns == ["score", "value"] and table.notes == []
    assert table.rows == [["a/probability", "0.250"], ["a/rouge", "1.000"]]
    assert score_table({"a/probability": Score(2.3e-5, [2.3e-5])}).rows[0][1] == "0.000023"


def test_scores_beside_the_oracles():
    table = score_table(MODEL, ORACLES)
    assert table.columns == ["score", "value", "mean of the oracles", "unit", "distance"] and table.notes == []
    assert table.rows[0] == ["forget/probability", "0.100", "0.300", "0.14", "-1.4"]
    assert [row[0] for row in table.rows] == list(MODEL)


def test_the_unit_is_not_the_deviation_where_the_rows_say_more():
    found = [{"a/rouge": Score(0.3, rows)} for rows in ([0.1, 0.5], [0.3, 0.3])]
    assert score_table({"a/rouge": Score(0.5, [0.5, 0.5])}, found).rows == [
        ["a/rouge", "0.500", "0.300", "0.1", "+2.0"]
    ]


def test_what_is_not_compared_has_a_note():
    guards = {"forget/fluency": Score(0.5, [0.5]), "forget/expert_0": Score(0.5, [0.5])}
    own = {**MODEL, "forget/rouge": Score(0.5, [0.5]), **guards}
    lacking = {key: score for key, score in ORACLES[1].items() if key != "utility/model_utility"}
    shorter = {**ORACLES[0], "forget/probability": Score(0.2, [0.2] * 3), "world/rouge": Score(0.1, [0.1])}
    table = score_table(own, [shorter, lacking])
    notes = {row[0]: table.notes[int(row[2][1:-1]) - 1] for row in table.rows if row[2].startswith("[")}
    assert notes == {
        "forget/probability": "Not compared: the oracles have 3 or 4 rows, the model has 4.",
        "utility/model_utility": "Not compared: 1 of the 2 oracles lack this score.",
        "forget/rouge": "Not compared: 2 of the 2 oracles lack this score.",
    }
    assert [row[2:] for row in table.rows if row[0] in guards] == [["", "", ""]] * 2
    assert all(row[3:] == ["", ""] for row in table.rows if row[2].startswith("["))
    assert table.notes[-1] == "Of the oracles alone, and so not compared: world/rouge."


def test_an_adapter_switched_off_is_beside_the_oracles_own_scores():
    own = {**MODEL, "switched_off/probability": Score(0.9, [0.9] * 4), "merged/int8/rouge": Score(0.5, [0.5])}
    oracles = [{**one, "quantized/int8/rouge": Score(i / 4, [i / 4])} for i, one in enumerate(ORACLES)]
    rows = {row[0]: row[1:] for row in score_table(own, oracles).rows}
    assert rows["switched_off/probability"] == ["0.900", "0.300", "0.14", "+4.2"]
    assert rows["merged/int8/rouge"] == ["0.500", "0.125", "0.18", "+2.1"]


@pytest.mark.parametrize(
    ("key", "own", "oracle", "expected"),
    [
        ("forget/rouge", {"max_new_tokens": 200}, {}, "`max_new_tokens` is 200 for the model, and 8 for an oracle"),
        ("forget/probability", {"max_new_tokens": 200}, {}, None),
        ("forget/rouge", {"as_chat": False}, {}, "`as_chat` is False for the model, and True for an oracle"),
        ("forget/rouge", {"as_chat": True}, {}, None),
        ("a/rouge", {"forget": ["a"]}, {}, "`is_forget` is True for the model, and False for an oracle"),
        (
            "asked/misspelt/rouge", {"forget": ["a"]}, {},
            "`forget` is ['a'] for the model, and ['forget'] for an oracle",
        ),
        ("forget/rouge", {"sets": ["forget=x/a.jsonl"]}, {"sets": ["forget=y/a.jsonl"]}, None),
        (
            "forget/min_k", {"sets": ["forget=a.jsonl"]}, {"sets": ["forget=b.jsonl"]},
            "`sets` is {'forget': 'a.jsonl'} for the model, and {'forget': 'b.jsonl'} for an oracle",
        ),
        (
            "a/acc", {"tasks": ["a.jsonl"], "form": "texts", "limit": 3}, {},
            "an oracle's result does not say its `limit`",
        ),
        (
            "a/acc", {"tasks": ["a.jsonl"], "form": "texts", "limit": 3},
            {"processes": 1, "tasks": {"x/a.jsonl": {"form": "letters", "limit": 3}}},
            "`form` is 'texts' for the model, and 'letters' for an oracle",
        ),
        (
            "forget/rouge", {"tofu": "x", "split": "forget01", "rows": None, "retain_rows": None},
            {"processes": 1, "data": "x", "books": None, "split": "forget05", "rows": None, "retain_rows": None},
            "`split` is 'forget01' for the model, and 'forget05' for an oracle",
        ),
    ],
)  # fmt: skip
def test_what_was_measured_otherwise_has_a_note(key, own, oracle, expected):
    found = {key: Score(0.5, [0.5])}
    oracles = [of({key: Score(value, [value])}, **oracle) for value in (0.1, 0.2)]
    table = comparison.score_table(of(found, **own), oracles)
    assert table.notes == ([] if expected is None else [f"Not compared: {expected}."])
    assert (table.rows[0][4] == "") == (expected is not None)
    bare = Result("m", 0, scores=found)
    assert comparison.score_table(of(found, **own), [bare, bare]).rows[0][4] == ""


def test_forget_quality_is_of_what_was_measured_alike():
    table = comparison.oracle_table(of(MODEL, bf16=False), [of(one) for one in ORACLES])
    assert table.rows == [] and "`bf16` is False for the model, and True for an oracle" in table.notes[0]


def relearned(*values, rate=1e-4, with_rows=True):
    """A result of relearning after 0, 20 and 50 steps."""
    points = list(zip((0.0, 20.0, 50.0), values, strict=True))
    key = "relearn_half/trained, step {:g}/probability"
    scores = {key.format(step): Score(value, [value] * 4) for step, value in points} if with_rows else {}
    curves = {"relearn_half/trained/probability": points}
    settings = {**SETTINGS, "relearning_rate": rate}
    return Result("m", 0, scores={**scores, "forget/rouge": Score(0.5, [0.5])}, curves=curves, settings=settings)


def test_relearning_is_shown_at_the_last_and_the_farthest_step():
    own, oracles = relearned(0.1, 0.9, 0.7), [relearned(0.1 + x, 0.5 + x, 0.6 + x) for x in (0.0, 0.1)]
    last, farthest = (f"relearn_half/trained, step {step}/probability" for step in (50, 20))
    assert [row[0] for row in comparison.score_table(own).rows] == [last, "forget/rouge"]
    rows = {row[0]: row[1:] for row in comparison.score_table(own, oracles).rows}
    assert list(rows) == [farthest, last, "forget/rouge"]
    assert rows[farthest][0] == "0.900" and rows[farthest][-1] == "+4.9"
    bare = Result("m", 0, scores={"forget/rouge": Score(0.5, [0.5])}, settings=SETTINGS)
    assert comparison.score_table(bare, oracles).notes == [f"Of the oracles alone, and so not compared: {last}."]


def test_relearning_is_compared_at_one_rate():
    own, oracles = relearned(0.1, 0.9, 0.7), [relearned(0.1, 0.5, 0.6 + x, rate=1e-3) for x in (0.0, 0.1)]
    table = comparison.score_table(own, oracles)
    assert table.notes == ["Not compared: `relearning_rate` is 0.0001 for the model, and 0.001 for an oracle."]
    of_grid = [Result(one.name, 0, one.scores, one.curves, settings={**SETTINGS, "processes": 1}) for one in oracles]
    for one in of_grid:  # a grid of before it wrote the rate took 1e-4
        one.settings |= {"data": None, "books": None}
    assert not [note for note in comparison.score_table(own, of_grid).notes if "relearning_rate" in note]


def test_relearning_of_files_without_rows_has_a_note():
    own, oracles = relearned(0.1, 0.9, 0.7), [relearned(0.1, 0.5, x, with_rows=False) for x in (0.0, 0.1)]
    assert comparison.score_table(own, oracles).notes == ["Not compared: the oracles have 0 rows, the model has 4."]


# ---- oracle_table ---------------------------------------------------------------------------------------------------


def test_what_several_scores_say_together():
    found = compare_with_oracles(MODEL, ORACLES)
    rows = {row[0]: row[1:] for row in oracle_table(MODEL, ORACLES).rows}
    quality = found.forget_quality
    expected = f"{quality.pvalue.median:.2g} ({quality.pvalue.lowest:.2g} to {quality.pvalue.highest:.2g})"
    assert rows["forget quality (p of KS)"][0] == expected
    assert rows["membership AUC"][0] == f"{found.membership.auc.value:.3f}"
    assert rows["membership AUC"][2:] == [
        f"{found.membership.auc.band.spread:.2g}",
        f"{found.membership.auc.distance:+.1f}",
    ]
    assert rows["PrivLeak (%)"][:2] == [f"{found.membership.privleak:+.1f}", "0"]


@pytest.mark.parametrize("key", COMPARED)
def test_without_one_of_them_there_is_a_note(key):
    lacking = {name: score for name, score in MODEL.items() if name != key}
    for model, oracles in ((lacking, ORACLES), (MODEL, [lacking, ORACLES[0]])):
        table = oracle_table(model, oracles)
        assert table.rows == [] and len(table.notes) == 1 and f"{key}: " in table.notes[0]


def test_oracles_without_a_level():
    seen = {**ORACLES[0], "holdout/min_k": Score(25.0, [value + 100 for value in MIN_K])}
    table = oracle_table(MODEL, [seen, seen])
    assert table.rows == [] and "not compared: The oracle's `oracle_auc` is 0" in table.notes[0]
