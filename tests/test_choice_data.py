# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
from questions import ANSWERS, ROWS, save

from alter_peft.evaluation.tasks.choice_data import read_questions


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json", "q.json.gz"])
def test_a_file_is_read_in_every_form(tmp_path, name):
    rows = read_questions(save(tmp_path / name, ROWS))
    assert [row["answer"] for row in rows] == ANSWERS
    assert [row["choices"] for row in rows] == [row["choices"] for row in ROWS]


def test_a_text_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path):
    row = {**ROWS[0], "question": "Who\u2028bakes\x85the bread?"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(tmp_path / "q.jsonl") == [row]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "Who?", "choices": ["a", "b"]}, "Row 1 of '.*q.jsonl' has no column 'answer'"),
        (["Who?"], "has no column 'question'"),
        ({**ROWS[0], "answer": 4}, "has the `answer` 4, but must have the place of one of its 4 choices"),
        ({**ROWS[0], "answer": -1}, "has the `answer` -1, but"),
        ({**ROWS[0], "answer": True}, "has the `answer` True, but"),
        ({**ROWS[0], "answer": "Carl"}, "has the `answer` 'Carl', but"),
        ({**ROWS[0], "choices": ["a", "a"], "answer": "a"}, "has the `answer` 'a', but"),
        ({**ROWS[0], "choices": ["a"]}, r"has the `choices` \['a'\], but must have a list of 2 to 26"),
        ({**ROWS[0], "choices": "abcd"}, "has the `choices` 'abcd', but"),
        ({**ROWS[0], "choices": ["a", ""]}, "has a `question` or one of `choices` that is no text or empty"),
        ({**ROWS[0], "question": 3}, "has a `question` or one of `choices` that is no text or empty"),
    ],
)
def test_a_row_that_cannot_be_asked(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_questions(save(tmp_path / "q.jsonl", [ROWS[0], row]))


@pytest.mark.parametrize(
    "text, message", [("{", "q.json' is no JSON"), ("[]", "q.json' has no rows"), ("3", "q.json' has no rows")]
)
def test_a_file_that_holds_no_rows(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.json")


def test_the_data_beside_the_checkout_can_be_read(tofu):
    for name, rows in (("mmlu_dev", 285), ("mmlu_test", 14042), ("arc_easy_dev", 570), ("arc_easy_test", 2376)):
        assert len(read_questions(tofu.parent / "mcq" / f"{name}.jsonl.gz")) == rows
