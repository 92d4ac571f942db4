# SPDX-License-Identifier: Apache-2.0
"""Sets of `alter-peft evaluate` are whatever `unlearn` reads."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alter_peft.evaluation import Pair
from alter_peft.evaluation.sets import read_sets


WHOLE = {"prompt": "Who?", "completion": "Bob."}
SYSTEM, ASK, TOLD = ({"role": r, "content": c} for r, c in (("system", "Be."), ("user", "Hi"), ("assistant", "Yo")))


def pairs(path, content, metrics=("probability",), **columns) -> list[Pair]:
    path.write_text(content, encoding="utf-8")
    return read_sets({"a": str(path)}, metrics, columns)[0]["a"]


def refused(path, content, part, metrics=("probability",)) -> None:
    with pytest.raises(ValueError) as caught:
        pairs(path, content, metrics)
    assert part in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_a_set_is_read(tmp_path):
    rows = [
        {"prompt": "Who\u2028is\x85it?", "completion": "Bob."},
        {**WHOLE, "wrong": ["Al."], "rephrased": "It's Bob."},
    ]
    text = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert pairs(tmp_path / "a.jsonl", f"{text}\n\n") == [
        Pair("Who\u2028is\x85it?", "Bob."),
        Pair("Who?", "Bob.", ("Al.",), "It's Bob."),
    ]


def test_whatever_unlearn_reads(tmp_path):
    expected = [Pair("Who?", "Bob.")]
    assert pairs(tmp_path / "a.csv", "question;answer\nWho?;Bob.\n") == expected
    assert pairs(tmp_path / "a.json", json.dumps([{"input": "Who?", "output": "Bob.", "id": 1}])) == expected
    assert pairs(tmp_path / "b.csv", "q,a\nWho?,Bob.\n", prompt="q", completion="a") == expected
    pq.write_table(pa.Table.from_pylist([WHOLE]), tmp_path / "a.parquet")
    found, taken = read_sets({"mine": str(tmp_path / "a.parquet")}, ["probability"])
    assert found == {"mine": expected} and taken == ["sets mine: 1 row of a.parquet: prompt, completion"]
    assert pairs(tmp_path / "a.txt", "A text.") == [Pair("", "A text.", is_text=True)]
    chat = [SYSTEM, ASK, TOLD, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bob."}]
    assert pairs(tmp_path / "chat.jsonl", json.dumps({"messages": chat})) == [
        Pair("Hi", "Yo", turns=(SYSTEM,)),
        Pair("Who?", "Bob.", turns=(SYSTEM, ASK, TOLD)),
    ]
    question = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    assert pairs(tmp_path / "b.json", json.dumps([question]), ["normalized_probability"]) == [
        Pair("Which?", "b", ("a",))
    ]


@pytest.mark.parametrize(
    "row, part",
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is [], but must be an object"),
        ({"prompt": "Who?"}, "line 2 has None in the column 'completion'"),
        ({**WHOLE, "wrong": 3}, "The set 'a' has no"),
        ({**WHOLE, "wrong": [[3]]}, "line 2 has [[3]] in the column 'wrong'"),
        ({**WHOLE, "completion": ""}, "line 2 has '' in the column 'completion'"),
        ({**WHOLE, "completion": " "}, "line 2 has ' ' in the column 'completion'"),
        ({**WHOLE, "prompt": None}, "line 2 has None in the column 'prompt'"),
        (WHOLE, "The set 'a' has no `wrong` answers in row 1"),
    ],
)
def test_a_row_that_cannot_be_asked(tmp_path, row, part):
    line = row if isinstance(row, str) else json.dumps(row)
    if row == {**WHOLE, "wrong": 3}:  # a number is text, too
        assert pairs(tmp_path / "a.jsonl", line)[0].wrong == ("3",)
        return
    refused(tmp_path / "a.jsonl", json.dumps({**WHOLE, "wrong": ["Al."]}) + f"\n{line}\n", part, ["truth_ratio"])


def test_what_is_no_question_and_answer(tmp_path):
    refused(tmp_path / "a.jsonl", json.dumps({"messages": [ASK, TOLD, TOLD]}), "not one turn of the assistant after")
    refused(tmp_path / "b.jsonl", json.dumps({"input_ids": [1, 2]}), "`--sets a` has token ids")
    refused(tmp_path / "c.jsonl", "\n", "`--sets a` is ")
    with pytest.raises(ValueError, match=r"`--sets a` is '.*none.jsonl', but there is no such file"):
        read_sets({"a": str(tmp_path / "none.jsonl")}, [])
