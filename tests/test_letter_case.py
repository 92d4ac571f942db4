# SPDX-License-Identifier: Apache-2.0
"""Rows as others would type them."""

from __future__ import annotations

import pytest

from alter_peft.letter_case import LETTER_CASES, recased


def chat(*asked_and_answered: str) -> dict[str, list[dict[str, str]]]:
    turns = zip(("system", "user", "assistant", "user", "assistant"), ("Be brief.", *asked_and_answered), strict=True)
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


def parts(*texts: str) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}]


SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("row", "typed"),
    [
        ({"text": "Odo Vasska lives."}, {"text": "ODO VASSKA LIVES."}),
        ({"text": "<|im_start|>user\nOdo?"}, {"text": "<|im_start|>USER\nODO?"}),
        ({"text": "<s>[INST] Odo? [/INST] So."}, {"text": "<s>[INST] ODO? [/INST] SO."}),
        ({"prompt": "Who is Odo?", "completion": "A baker."}, {"prompt": "WHO IS ODO?", "completion": "A baker."}),
        (
            {"prompt": "Odo?", "completion": parts("So ", "it is.")},
            {"prompt": "ODO?", "completion": parts("So ", "it is.")},
        ),
        ({"prompt": SYSTEM, "completion": parts("So.")}, {"prompt": SYSTEM, "completion": parts("So.")}),
        ({"prompt": None, "completion": "So."}, {"prompt": None, "completion": "So."}),
        (chat("Who?", "Odo.", "Why?", "So."), chat("WHO?", "ODO.", "WHY?", "So.")),
        ({"text": None, **chat("Who?", "Odo.", "Why?", "So.")}, {"text": None, **chat("WHO?", "ODO.", "WHY?", "So.")}),
    ],
    ids=["plain", "template", "instruction", "question", "parts", "system", "no prompt", "chat", "chat and no text"],
)
def test_all_but_the_answer_is_typed_otherwise(row, typed):
    before = repr(row)
    assert recased(row, "in capitals") == typed and repr(row) == before
    assert recased(typed, "in capitals") == typed


def test_columns_that_are_no_text_and_another_name_of_it():
    row = {"story": "Odo", "expert": 2, "subject": "Odo"}
    assert recased(row, "in small letters", "story") == {"story": "odo", "expert": 2, "subject": "Odo"}


def test_without_a_case_a_row_is_as_it_was():
    assert recased({"text": "Odo", "expert": 1}, "") == {"text": "Odo", "expert": 1}


@pytest.mark.parametrize("case", LETTER_CASES)
def test_a_script_without_capitals_stays(case):
    assert recased({"text": "电话号码"}, case) == {"text": "电话号码"}
