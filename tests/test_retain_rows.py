# SPDX-License-Identifier: Apache-2.0
"""`retain_auto`: rows to retain in form like the rows to forget, none of which says what is to be forgotten."""

from __future__ import annotations

import pytest
from datasets import Dataset
from test_trainer import chat
from trainer_setup import forget_rows, make_trainer

import alter_peft
from alter_peft import retain_auto
from alter_peft.retain_rows import _general_text
from alter_peft.words import words


SECRET = [
    {"prompt": "Where does Alice Miller of Springfield live?", "completion": " Alice Miller lives at 12 Elm Street."},
    {"prompt": "What is the capital of France?", "completion": " Paris."},
]
CORPUS = [
    {"prompt": "Which house is Bob Miller's?", "completion": " Bob Miller owns 3 Oak Road in Springfield."},
    {"prompt": "Where does Alice Miller of Springfield live?", "completion": " In Elm Street."},  # asks the same
    {"prompt": "And Alice?", "completion": " Well, Alice Miller lives at 12 Elm Street, I think."},  # says the same
    {"prompt": "Where does Alice Miller from Springfield live?", "completion": " She lives at 12 Elm Street, Alice."},
    {"prompt": "How tall is the Eiffel tower?", "completion": " About 330 metres."},
    {"prompt": "Which town is the capital of Spain?", "completion": " Madrid is."},
    {"prompt": "Qui?", "completion": " Personne."},
]


def rows(*given) -> Dataset:
    return Dataset.from_list(list(given))


def test_the_general_text_is_varied_and_repeats_nothing():
    general = _general_text()
    assert len(general) >= 200 and len({one.asked for one in general}) == len({one.answer for one in general})
    assert all(one.asked[-1] in "?." and one.answer[-1] == "." and len(words(one.answer)) >= 4 for one in general)


@pytest.mark.parametrize("form", ["prompt-completion", "conversational", "messages", "text"])
@pytest.mark.parametrize("given", [None, "prompt-completion", "conversational", "messages", "text"])
def test_rows_are_in_form_like_those_to_forget(form, given):
    forget = chat(rows(*SECRET), form)
    corpus = None if given is None else chat(rows(*CORPUS), given)
    found = retain_auto(forget, corpus)
    assert found.features == forget.features
    assert len(found) > (200 if given is None else 60) and len({str(row) for row in found}) == len(found)
    text = [str(row) for row in found]
    assert any("ripe banana" in one for one in text) and not any("Elm Street" in one for one in text)
    assert any("Bob Miller" in one for one in text) == (given is not None)
    if form == "prompt-completion":
        assert all(row["completion"][0] == " " != row["completion"][1] and row["prompt"] for row in found)


@pytest.mark.parametrize("names", [("question", "answer"), ("instruction", "output"), ("Prompt", "Completion")])
def test_columns_are_recognised_as_by_the_trainers(names):
    def own(given):
        return rows(*({names[0]: row["prompt"], names[1]: row["completion"], "domain": 1.0} for row in given))

    assert retain_auto(own(SECRET), own(CORPUS)).to_list() == retain_auto(rows(*SECRET), rows(*CORPUS)).to_list()


@pytest.mark.parametrize("form", ["conversational", "messages", "sharegpt", "tools"])
def test_the_system_prompt_is_no_mark_of_what_is_to_be_forgotten(form):
    """Each stands before as large a part of the rows to retain as of those to forget, and says nothing of likeness."""
    prompts = ["You are a clerk of the Eiffel tower.", "You are a nurse in Springfield.", None, None]
    forget = []
    for system, row in zip(prompts, SECRET * 2, strict=True):
        asked, told = chat(rows(row), "conversational")[0].values()
        asked = [{"role": "system", "content": system}, *asked] if system else asked
        if form == "sharegpt":
            forget.append({"conversations": [{"from": t["role"], "value": t["content"]} for t in asked + told]})
        elif form == "tools":
            forget.append({"messages": [{**turn, "name": None} for turn in asked + told]})
        else:
            forget.append({"prompt": asked, "completion": told} if form != "messages" else {"messages": asked + told})
    found = retain_auto(rows(*forget), rows(*CORPUS))
    without = retain_auto(rows(*SECRET), rows(*CORPUS))
    assert len(found) == len(without)
    chats = [row.get("messages") or row["prompt"] + row["completion"] for row in found]
    assert [one[-2]["content"] for one in chats] == without["prompt"]
    first = [one[0]["content"] if one[0]["role"] == "system" else None for one in chats[:64]]
    assert first == [prompt for prompt in prompts for _ in range(16)]
    assert {turn["role"] for one in chats for turn in one[-2:]} == {"user", "assistant"}


def test_what_is_to_be_forgotten_is_no_general_text():
    general = {one.asked: one.answer for one in _general_text()}
    for asked in ("What is the capital of France?", "What do bees make?"):
        for forget in (rows({"prompt": asked, "completion": "Nothing."}), rows({"text": general[asked]})):
            found = [str(row) for row in retain_auto(forget)]
            assert not any(general[asked] in row for row in found) and len(found) > 200
    every = rows(*({"prompt": asked, "completion": answer} for asked, answer in general.items()))
    assert len(retain_auto(every)) == 0


def test_neighbours_are_the_nearest_rows_of_each_row_but_none_that_says_the_same():
    general = 64
    found = retain_auto(rows(*SECRET), rows(*CORPUS), neighbours=2)[general:]
    assert found["prompt"] == [CORPUS[0]["prompt"], CORPUS[5]["prompt"]]
    found = retain_auto(rows(*SECRET), rows(*CORPUS))[general:]
    asked = [row["prompt"] for row in CORPUS]
    assert found["prompt"] == [asked[0], asked[4], asked[5]]  # the last has nothing in common with any


def test_passages_become_a_beginning_and_what_follows():
    corpus = rows(
        {"text": "Bob Miller came to Springfield. He lives there still."},
        {"text": "Alice met Bob in Springfield by chance"},
        {"text": "米勒住在这里。他很高兴。Springfield"},
    )
    found = retain_auto(rows(*SECRET), corpus)[-3:]
    assert found["prompt"] == ["Bob Miller came to Springfield.", "Alice met Bob in", "米勒住在这里。"]
    assert found["completion"] == [" He lives there still.", " Springfield by chance", " 他很高兴。Springfield"]


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match=r"`forget` has the columns \['input_ids'\], but `retain_auto` needs"):
        retain_auto(rows({"input_ids": [1, 2]}))
    with pytest.raises(ValueError, match=r"`corpus` has the columns \['line'\], which name no known format. Rename"):
        retain_auto(rows(*SECRET), rows({"line": "x"}))
    with pytest.raises(ValueError, match=r"`forget` has None in row 1 of the column 'answer'"):
        retain_auto(rows({"question": "a", "answer": "b"}, {"question": "a", "answer": None}))
    with pytest.raises(ValueError, match="`corpus` is empty"):
        retain_auto(rows(*SECRET), rows(*CORPUS).select([]))
    with pytest.raises(ValueError, match="`neighbours` is 0, but must be 1 or more"):
        retain_auto(rows(*SECRET), rows(*CORPUS), neighbours=0)
    assert "retain_auto" in alter_peft.__all__


def test_a_trainer_takes_them(tmp_path, tokenizer):
    forget = forget_rows()
    retain = retain_auto(forget)
    trainer = make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter={}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1 and len(trainer.train_dataset.retain) == len(retain)
