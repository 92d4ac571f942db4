# SPDX-License-Identifier: Apache-2.0
"""The rows that a trainer is given in Python: which columns are taken, and one line where a value is of no use."""

from __future__ import annotations

import pytest
from datasets import Dataset
from trainer_setup import forget_rows, make_trainer, retain_rows

from alter_peft.trainer.rows import checked_dataset


SYSTEM, ASK, TOLD = ({"role": r, "content": c} for r, c in (("system", "Be."), ("user", "Hi"), ("assistant", "Yo")))
AGAIN = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
CHAT = [SYSTEM, ASK, TOLD, *AGAIN]


def checked(*rows, name="train_dataset", **options) -> list[dict]:
    return checked_dataset(name, Dataset.from_list(list(rows)), options.pop("text_field", "text"), **options).to_list()


def refused(*rows, parts, **options) -> None:
    with pytest.raises(ValueError) as caught:
        checked(*rows, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("`train_dataset` ")
    assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize(
    "names", ["question/answer", "input/output", "text/labels", "instruction/response", "query/response"]
)
def test_names_that_the_field_uses(names, caplog):
    prompt, completion = names.split("/")
    assert checked({prompt: "Who?", completion: "Bob.", "id": 3}) == [{"prompt": "Who?", "completion": "Bob."}]
    assert caplog.messages == [
        f"`train_dataset`: prompt from {prompt!r}, completion from {completion!r}; left alone: id."
    ]


def test_nothing_is_said_where_nothing_is_chosen(caplog):
    checked({"prompt": "Who?", "completion": "Bob.", "domain": "x", "wrong": ["Al."]})
    checked({"text": "Bob."})
    assert caplog.messages == []


def test_an_edge_is_the_sub_domain_of_rows_to_forget_alone():
    rows = [{"question": f"Q{i}", "answer": "A", "edge": "A_B"} for i in range(4)]
    assert checked(*rows)[0] == {"prompt": "Q0", "completion": "A", "domain": "A_B"}
    assert checked(*rows, name="retain_dataset")[0] == {"prompt": "Q0", "completion": "A"}


def test_a_domain_is_read_of_rows_to_forget_alone():
    row = {"prompt": "Who?", "completion": "Bob.", "domain": [1]}
    refused(row, parts=("has [1] in row 0 of the column 'domain'",))
    for name in ("retain_dataset", "calibration_dataset", "eval_dataset"):
        assert checked(row, name=name) == [{"prompt": "Who?", "completion": "Bob."}]


@pytest.mark.parametrize("text", [{"body": "A passage."}, {"Body Text": "A passage."}])
def test_dataset_text_field_comes_before_other_names(text):
    (name,) = text
    row = {**text, "question": "Who?", "answer": "Bob."}
    assert checked(row, text_field=name) == [text]
    assert checked(row) == [{"prompt": "Who?", "completion": "Bob."}]


@pytest.mark.parametrize("value", ["", "  ", "\u200b", None])
def test_a_row_without_an_answer(value):
    rows = {"question": "Who?", "answer": "Bob."}, {"question": "And?", "answer": value}
    refused(*rows, parts=(f"has {value!r} in row 1 of the column 'answer'", "Fill it in, or remove the row"))
    rows = {"text": "Bob."}, {"text": value}
    refused(*rows, parts=(f"has {value!r} in row 1 of the column 'text'",))


@pytest.mark.parametrize(
    "value, text", [(7, "7"), (0.5, "0.5"), (True, "true"), (7.0, None), (["x"], None), ({"a": 1}, None)]
)
def test_values_that_are_no_strings(value, text):
    row = {"prompt": "Who?", "completion": value}
    if text is None:
        refused(row, row, parts=("in row 0 of the column 'completion'", "Write it as text"))
    else:
        assert checked(row) == [{"prompt": "Who?", "completion": text}]


def test_labels_that_are_no_token_ids():
    assert checked({"text": "What is it?", "labels": "That."}) == [{"prompt": "What is it?", "completion": "That."}]
    assert checked({"prompt": "a", "completion": "b", "labels": "c"}) == [{"prompt": "a", "completion": "b"}]
    assert checked({"input_ids": [1, 2], "labels": "c"}) == [{"input_ids": [1, 2]}]
    ids = {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}
    assert checked(ids) == [ids]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]},
        {"conversations": [{"from": who, "value": turn["content"]}
                           for who, turn in zip(("system", "human", "gpt", "human", "gpt"), CHAT, strict=True)]},
    ],
)  # fmt: skip
def test_the_assistants_turns_alone(row, caplog):
    expected = [{"prompt": [SYSTEM, ASK], "completion": [TOLD]}, {"prompt": CHAT[:4], "completion": CHAT[4:]}]
    assert checked({**row, "domain": "x"}) == [{**pair, "domain": "x"} for pair in expected]
    assert "the assistant's turns alone count (2)" in caplog.messages[0]
    assert checked({"messages": CHAT}, answers_alone=False) == [{"messages": CHAT}]


def test_chats_with_tools_stay_as_they_are():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}
    found = checked({"messages": [{**ASK, "tool_calls": None}, call], "tools": "[]"})
    assert found == [{"prompt": [{**ASK, "tool_calls": None}], "completion": [call], "tools": "[]"}]


def test_chats_without_an_answer():
    refused({"messages": CHAT}, {"messages": CHAT[:2]}, parts=("in row 1 of the column 'messages'", "no turn of the"))


def test_a_chat_as_text_stays_text():
    text = "<|user|>Hi<|assistant|>Yo"
    assert checked({"text": text}) == [{"text": text}]
    assert checked({"log": text}, text_field="log") == [{"log": text}]


def test_formats_and_transforms():
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert checked_dataset("train_dataset", rows.with_format("numpy"), "text").format["type"] is None
    with pytest.raises(ValueError, match=r"`train_dataset` has a transform .* by `map`"):
        checked_dataset("train_dataset", rows.with_transform(lambda batch: batch), "text")


def test_a_chat_is_learned_from_by_its_answers(tmp_path, tokenizer):
    """Of the system's and the user's turns no token is a label."""
    rows = Dataset.from_list([{"messages": [SYSTEM, {"role": "user", "content": r["prompt"]},
                                            {"role": "assistant", "content": r["completion"]}, *AGAIN]}
                              for r in forget_rows(4)])  # fmt: skip
    trainer = make_trainer(tmp_path, tokenizer, forget=rows, retain=retain_rows(), adapter={"num_forget_experts": 1})
    told = [tokenizer.decode([t for t in labels if t != -100]) for labels in trainer._forget["labels"]]
    assert len(told) == 8 and "Alice lives in Paris." in told[0] and told[1].startswith("Here.")
    assert not [one for one in told if "Be." in one or "Where" in one]
