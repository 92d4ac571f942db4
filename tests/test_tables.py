# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from alter_peft.evaluation import Key, Result, Score, Scores, compare_with_oracles
from alter_peft.evaluation.oracle import COMPARED
from alter_peft.evaluation.tables import (
    Table,
    oracle_table,
    result_table,
    to_markdown,
    value_text,
)


TABLE = Table("Ti<tle", "Cap & tion", ["model", "P", "Q"], [["a|b", "1", "2"], ["c", "failed: <x>"]])


def test_markdown_pads_and_escapes():
    expected = "| model | P | Q |\n|---|---|---|\n| a\\|b | 1 | 2 |\n| c | failed: <x> |  |"
    assert to_markdown(TABLE) == expected


def test_a_footnote_is_written_once():
    table = Table("", "", ["a", "b", "c"])
    table.rows.append(["x", table.mark("why"), table.mark("other")])
    table.rows.append(["y", table.mark("why"), "1"])
    assert table.rows == [["x", "[1]", "[2]"], ["y", "[1]", "1"]]
    assert to_markdown(table).endswith("| y | [1] | 1 |\n\n[1] why\n\n[2] other")


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_small_values_keep_two_digits():
    assert [value_text(value) for value in (0.25, 1.0, 2.3e-5, 0.0)] == ["0.250", "1.000", "0.000023", "0.000"]


# ---- result_table ---------------------------------------------------------------------------------------------------


RATIOS, LEVELS = [0.5, 0.7, 0.9, 1.1], [1.0, 2.0, 3.0, 4.0]
UTILITY = Key("utility", "model_utility")
ALIKE = {"bf16": True, "answered": 4, "max_new_tokens": 8}


def scored(probability: float, utility: float, shift: float = 0.0) -> Scores:
    """Scores of a model; `shift` moves its truth ratios and its Min-K% on the forget set."""
    return Scores([
        Score.averaged("forget", "probability", [probability] * 4),
        Score.averaged("forget", "truth_ratio", [ratio + shift for ratio in RATIOS], "near_one"),
        Score.averaged("forget", "min_k", [value + 10 * shift for value in LEVELS]),
        Score.averaged("holdout", "min_k", LEVELS),
        Score(*UTILITY[:2], utility, average="other"),
    ])  # fmt: skip


def score(set: str, metric: str, *rows: float, **other) -> Score:
    return Score.averaged(set, metric, rows, **other)


def of(scores) -> Result:
    return Result("m", 0, scores=Scores(scores if isinstance(scores, list) else scores.values()))


def with_also(scores: Scores, *others: Score) -> Scores:
    return Scores([*scores.values(), *others])


def without(scores: Scores, key: Key) -> Scores:
    return Scores(score for score in scores.values() if score.key != key)


MODEL = scored(0.1, 0.5, 0.3)
ORACLES = [scored(0.2, 0.5, 0.0), scored(0.4, 0.7, 0.1)]


def table_of(model, oracles=()) -> Table:
    return result_table(of(model), list(map(of, oracles)))


def test_scores_by_themselves():
    table = table_of([score("a", "probability", 0.25), score("a", "rouge", 1.0)])
    assert table.columns == ["score", "value"] and table.notes == []
    assert table.rows == [["a/probability", "0.250"], ["a/rouge", "1.000"]]


def test_scores_beside_the_oracles():
    table = table_of(MODEL, ORACLES)
    assert table.columns == ["score", "value", "mean of the oracles", "unit", "distance"] and table.notes == []
    assert table.rows[0] == ["forget/probability", "0.100", "0.300", "0.14", "-1.4"]
    assert [row[0] for row in table.rows] == list(map(str, MODEL))


def test_the_unit_is_not_the_deviation_where_the_rows_say_more():
    oracles = [[score("a", "rouge", *rows)] for rows in ([0.1, 0.5], [0.3, 0.3])]
    assert table_of([score("a", "rouge", 0.5, 0.5)], oracles).rows == [["a/rouge", "0.500", "0.300", "0.1", "+2.0"]]


def test_what_is_not_compared_has_a_note():
    guards = [score("forget", "fluency", 0.5), score("forget", "expert_0", 0.5)]
    own = with_also(MODEL, score("forget", "rouge", 0.5), *guards)
    shorter = with_also(ORACLES[0], score("forget", "probability", *[0.2] * 3), score("world", "rouge", 0.1))
    table = table_of(own, [shorter, without(ORACLES[1], UTILITY)])
    notes = {row[0]: table.notes[int(row[2][1:-1]) - 1] for row in table.rows if row[2].startswith("[")}
    assert notes == {
        "forget/probability": "Not compared: `number of rows` is 4 for the model, and 3 for an oracle.",
        "utility/model_utility": "Not compared: 1 of the 2 oracles lack this score.",
        "forget/rouge": "Not compared: 2 of the 2 oracles lack this score.",
    }
    assert [row[2:] for row in table.rows if row[0] in ("forget/fluency", "forget/expert_0")] == [["", "", ""]] * 2
    assert all(row[3:] == ["", ""] for row in table.rows if row[2].startswith("["))
    assert table.notes[-1] == "Of the oracles alone, and so not compared: world/rouge."


def test_an_adapter_switched_off_is_beside_the_oracles_own_scores():
    off = score("forget", "probability", *[0.9] * 4, attack="switching_off")
    merge = score("forget, 8 bits", "rouge", 0.5, attack="merged_quantization")
    oracles = [
        with_also(one, score("forget, 8 bits", "rouge", i / 4, attack="quantization")) for i, one in enumerate(ORACLES)
    ]
    rows = {row[0]: row[1:] for row in table_of(with_also(MODEL, off, merge), oracles).rows}
    assert rows["switching_off/forget/probability"] == ["0.900", "0.300", "0.14", "+4.2"]
    assert rows["merged_quantization/forget, 8 bits/rouge"] == ["0.500", "0.125", "0.18", "+2.1"]


@pytest.mark.parametrize(
    ("own", "oracle", "expected"),
    [
        ({}, {}, None),
        ({"max_new_tokens": 200}, {}, "`max_new_tokens` is 200 for the model, and 8 for an oracle"),
        ({"is_forget": True}, {"is_forget": False}, "`is_forget` is True for the model, and False for an oracle"),
        ({"files": ["a.jsonl"]}, {"files": ["b.jsonl"]}, "`files` is ['a.jsonl'] for the model, and ['b.jsonl'] for"),
        ({"limit": 3}, {}, "`limit` is 3 for the model, and not set for an oracle"),
        ({}, {"tofu": "forget05"}, "`tofu` is not set for the model, and 'forget05' for an oracle"),
        ({"relearning_rate": 1e-4}, {"relearning_rate": 1e-3}, "`relearning_rate` is 0.0001 for the model, and 0.001"),
    ],
)
def test_what_was_measured_otherwise_has_a_note(own, oracle, expected):
    model = [score("a", "rouge", 0.5, settings={**ALIKE, **own})]
    table = table_of(model, [[score("a", "rouge", x, settings={**ALIKE, **oracle})] for x in (0.1, 0.2)])
    assert (table.rows[0][4] == "") == (expected is not None)
    assert len(table.notes) == (expected is not None)
    assert expected is None or table.notes[0].startswith(f"Not compared: {expected}")


def relearned(*values: float) -> list[Score]:
    """Of relearning after 0, 20 and 50 steps, and another score."""
    points = zip((0, 20, 50), values, strict=True)
    scores = [score("trained half", "probability", *[x] * 4, attack="relearning", step=step) for step, x in points]
    return [*scores, score("forget", "rouge", 0.5)]


def test_relearning_is_shown_at_the_last_and_the_farthest_step():
    own, oracles = relearned(0.1, 0.9, 0.7), [relearned(0.1 + x, 0.5 + x, 0.6 + x) for x in (0.0, 0.1)]
    last, farthest = (f"relearning/trained half, step {step}/probability" for step in (50, 20))
    assert [row[0] for row in table_of(own).rows] == [last, "forget/rouge"]
    rows = {row[0]: row[1:] for row in table_of(own, oracles).rows}
    assert list(rows) == [farthest, last, "forget/rouge"]
    assert rows[farthest][0] == "0.900" and rows[farthest][-1] == "+4.9"
    bare = table_of([score("forget", "rouge", 0.5)], oracles)
    assert bare.notes == [f"Of the oracles alone, and so not compared: {last}."]


# ---- oracle_table ---------------------------------------------------------------------------------------------------


def beside(model, oracles) -> Table:
    return oracle_table(of(model), list(map(of, oracles)))


def test_what_several_scores_say_together():
    found = compare_with_oracles(MODEL, ORACLES)
    rows = {row[0]: row[1:] for row in beside(MODEL, ORACLES).rows}
    quality = found.forget_quality
    expected = f"{quality.pvalue.median:.2g} ({quality.pvalue.lowest:.2g} to {quality.pvalue.highest:.2g})"
    assert rows["forget quality (p of KS)"][0] == expected
    assert rows["membership AUC"][0] == f"{found.membership.auc.value:.3f}"
    auc = found.membership.auc
    assert rows["membership AUC"][2:] == [f"{auc.band.spread:.2g}", f"{auc.distance:+.1f}"]
    assert rows["PrivLeak (%)"][:2] == [f"{found.membership.privleak:+.1f}", "0"]


@pytest.mark.parametrize("key", COMPARED)
def test_without_one_of_them_there_is_a_note(key):
    for model, oracles in ((without(MODEL, key), ORACLES), (MODEL, [without(MODEL, key), ORACLES[0]])):
        table = beside(model, oracles)
        assert table.rows == [] and len(table.notes) == 1 and f"{key}: " in table.notes[0]


def test_forget_quality_is_of_what_was_measured_alike():
    own = [replace(one, settings={"bf16": False}) for one in MODEL.values()]
    oracles = [[replace(one, settings={"bf16": True}) for one in oracle.values()] for oracle in ORACLES]
    table = beside(own, oracles)
    assert table.rows == [] and "`bf16` is False for the model, and True for an oracle" in table.notes[0]


def test_oracles_without_a_level():
    seen = with_also(ORACLES[0], score("holdout", "min_k", *(value + 100 for value in LEVELS)))
    table = beside(MODEL, [seen, seen])
    assert table.rows == [] and "not compared: The oracle's `oracle_auc` is 0" in table.notes[0]
