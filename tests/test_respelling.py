# SPDX-License-Identifier: Apache-2.0
"""Rows as others would type them."""

from __future__ import annotations

import pytest

from alter_peft.respelling import RESPELLINGS, respelt


def chat(*asked_and_answered: str) -> dict[str, list[dict[str, str]]]:
    turns = zip(("system", "user", "assistant", "user", "assistant"), ("Be brief.", *asked_and_answered), strict=True)
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


@pytest.mark.parametrize(
    ("row", "typed"),
    [
        ({"text": "Odo Vasska lives."}, {"text": "ODO VASSKA LIVES."}),
        ({"prompt": "Who is Odo?", "completion": "A baker."}, {"prompt": "WHO IS ODO?", "completion": "A baker."}),
        (chat("Who?", "Odo.", "Why?", "So."), chat("WHO?", "ODO.", "WHY?", "So.")),
    ],
    ids=["plain text", "a question", "a chat"],
)
def test_all_but_the_answer_is_typed_otherwise(row, typed):
    before = repr(row)
    assert respelt(row, "in capitals") == typed and repr(row) == before
    assert respelt(typed, "in capitals") == typed


def test_columns_that_are_no_text_and_another_name_of_it():
    row = {"story": "Odo", "expert": 2, "subject": "Odo"}
    assert respelt(row, "in small letters", "story") == {"story": "odo", "expert": 2, "subject": "Odo"}


def test_without_a_spelling_a_row_is_as_it_was():
    assert respelt({"text": "Odo", "expert": 1}, "") == {"text": "Odo", "expert": 1}


@pytest.mark.parametrize("spelling", RESPELLINGS)
def test_a_script_without_capitals_stays(spelling):
    assert respelt({"text": "电话号码"}, spelling) == {"text": "电话号码"}
