# SPDX-License-Identifier: Apache-2.0
"""The texts of a row, whatever its format."""

from __future__ import annotations

from alter_peft.row_texts import change_texts, row_text, text_parts


def test_text_of_a_row():
    told = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bob."}]
    assert row_text({"prompt": "Who?", "completion": " Bob.", "domain": "x"}, "text") == "Who?  Bob."
    assert row_text({"messages": told}, "text") == "Who? Bob."
    assert row_text({"conversations": [{"from": "human", "value": "Who?"}]}, "text") == "Who?"
    assert row_text({"body": "Who?", "text": "no"}, "body") == "Who?"


def test_texts_are_read_and_changed_apart_but_no_system_prompt():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Bob."},
    ]
    row = {"prompt": chat[:2], "completion": chat[2:], "text": None, "domain": "x"}
    assert text_parts(row) == ["Who?", "Bob."]
    changed = change_texts(row, str.upper)
    assert text_parts(changed) == ["WHO?", "BOB."] and changed["prompt"][0] == chat[0]
    assert changed | {"prompt": 0, "completion": 0} == row | {"prompt": 0, "completion": 0}
    assert text_parts({"body": "Who?", "text": "no"}, "body") == ["Who?"]
