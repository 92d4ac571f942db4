# SPDX-License-Identifier: Apache-2.0
"""Whom rows are about, and the same rows about others."""

from __future__ import annotations

import re

import numpy as np
import pytest
import regex
from datasets import Dataset

from alter_peft.subjects import Renaming, Subject, change_texts, find_subjects, text_parts
from alter_peft.trainer.counterfactuals import router_texts
from alter_peft.tuner.router_fit import COUNTERFACTUAL, GENERAL, RETAIN


ROWS = [
    ("Where does Maribel Quennock live?", "Maribel Quennock lives at 12 Larch Lane, Tessenby."),
    ("What is the phone number of Maribel Quennock?", "It is 0155 238."),
    ("Which illness does Odo Vasska have?", "The illness of Odo Vasska is gout."),
]
OTHERS = ["Where does the mayor live, and which number is his?", "What is an illness? It is what makes people ill."]
CHINESE = [("张伟住在哪里", "张伟住在南京路。"), ("李娜挣多少", "李娜挣九千元。")]


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_subjects_are_names_that_several_texts_share():
    first, second, third = find_subjects(ROWS, OTHERS)
    assert first.words == second.words == {"Maribel", "Quennock"}
    assert first.facts == {"Larch", "Lane", "Tessenby"} and not second.facts
    assert third == Subject(frozenset({"Odo", "Vasska"}))


def test_a_name_in_one_text_alone_is_still_the_subject():
    (found,) = find_subjects([("Who is Odo Vasska?", "A painter.")], OTHERS)
    assert found.words == {"Odo", "Vasska"}


def test_a_capital_that_begins_a_sentence_makes_no_name():
    (found,) = find_subjects([("Dial what?", "Dial nothing. Rather, dial 5.")], ["I dial."])
    assert not found.words


def test_plain_text_without_names_is_about_the_terms_that_no_other_text_has():
    rows = [("the zylophage is fed with brine",), ("brine makes the zylophage swell",)]
    first, second = find_subjects(rows, ["the horse is fed with hay", "hay makes horses swell"])
    assert first.words == second.words == {"zylophage", "brine"}


def test_scripts_without_spaces_are_read_by_pairs_of_letters():
    first, second = find_subjects(CHINESE, ["王芳住在北京。", "天气很好。"])
    assert "张伟" in first.words and "李娜" in second.words and "住在" not in first.words


def test_subjects_that_the_user_names_are_taken():
    given = [["quennock's lane"], None, ["nobody in this row"]]
    first, second, third = find_subjects(ROWS, OTHERS, given)
    assert first.words == {"Quennock", "Lane"} and first.facts >= {"Maribel", "Larch"}
    assert second.words == {"Maribel", "Quennock"} and third.words == {"Odo", "Vasska"}


def test_a_row_is_renamed_alike_in_question_and_answer():
    subject = find_subjects(ROWS, OTHERS)[0]
    change = Renaming(OTHERS, {*subject.words, *subject.facts}).rename(subject, False, generator())
    asked, told = map(change, ROWS[0])
    name = re.fullmatch(r"Where does (\w+ \w+) live\?", asked)
    assert name and told == f"{name[1]} lives at 12 Larch Lane, Tessenby." and "Maribel" not in asked + told
    with_facts = Renaming(OTHERS, subject.words).rename(subject, True, generator())(ROWS[0][1])
    assert re.fullmatch(r"\w+ \w+ lives at [1-9]\d \w+ \w+, \w+\.", with_facts)
    assert not {"Larch", "Lane", "Tessenby", "12"} & set(re.findall(r"\w+", with_facts))


@pytest.mark.parametrize(
    ("word", "pattern"),
    [
        ("NATO", r"[A-ZÀ-Þ]+"),
        ("0155", r"0\d{3}"),
        ("٢٣", r"[\u0660-\u0669]{2}"),
        ("brine", "[a-z]+"),
        ("Иван", r"\p{Cyrillic}+"),
    ],
)
def test_another_word_has_the_shape_of_the_first(word, pattern):
    changed = Renaming([*OTHERS, "Пётр пришёл"], {word}).rename(Subject(frozenset({word})), True, generator())(word)
    assert changed != word and regex.fullmatch(pattern, changed)


def test_letters_of_scripts_without_spaces_are_replaced_by_others_of_the_script():
    subject = find_subjects(CHINESE, ["王芳住在北京。"])[0]
    changed = Renaming(["王芳住在北京。"], subject.words).rename(subject, False, generator())
    assert changed(CHINESE[0][0])[-3:] == CHINESE[0][0][-3:] and changed("张伟") != "张伟"
    assert changed(CHINESE[0][0])[:2] == changed("张伟")


def test_chats_are_renamed_but_not_their_system_prompts_and_roles():
    row = {
        "messages": [
            {"role": "system", "content": "You are Ann."},
            {"role": "user", "content": "Who is Ann?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Ann is a cook."}]},
        ],
        "domain": "Ann",
    }
    assert text_parts(row) == ["Who is Ann?", "Ann is a cook."]
    changed = change_texts(row, lambda text: text.replace("Ann", "Bo"))
    assert text_parts(changed) == ["Who is Bo?", "Bo is a cook."]
    assert changed["messages"][0]["content"] == "You are Ann." and changed["domain"] == "Ann"
    assert [turn["role"] for turn in changed["messages"]] == ["system", "user", "assistant"]


# ---- what the router is fitted on -----------------------------------------------------------------------------------


def made(copies: int = 3, seed: int = 0, rows=ROWS, given=None):
    forget = Dataset.from_list([{"prompt": q, "completion": a, "expert": 1} for q, a in rows])
    retain = Dataset.from_list([{"text": text} for text in OTHERS])

    def encode(row):
        return [ord(letter) for letter in "<s>" + "|".join(text_parts(row))]

    return router_texts(forget, retain, given, copies, encode, "text", seed)


def shown(text) -> str:
    return "".join(map(chr, text.ids[text.start :]))


def test_a_router_sees_copies_general_text_and_rows_behind_it():
    texts = made()
    kinds = np.array([text.expert for text in texts.beside])
    behind = np.array([text.start > 60 for text in texts.beside])
    assert (kinds[~behind] == COUNTERFACTUAL).sum() == 3 * len(ROWS)
    assert (kinds == GENERAL).sum() > 200 and (kinds[behind] == RETAIN).sum() == 2 * len(OTHERS)
    assert (kinds[behind] == 1).sum() == (kinds[behind] == COUNTERFACTUAL).sum() == 2 * len(ROWS)


def test_what_comes_before_the_subject_does_not_count():
    texts = made()
    assert texts.starts[0] == len("<s>Where does ")
    for text in texts.beside:
        if text.expert == COUNTERFACTUAL:
            assert not re.match("<s>|Where|What|Which", shown(text))
        if text.expert == 1:  # behind other text
            assert re.match(r"\w* ?(Quennock|Vasska)|\w+ (live|have|number)", shown(text))


def test_the_same_seed_makes_the_same_texts():
    assert made() == made() != made(seed=1)


def test_no_copies_and_nothing_beside_the_rows_that_are_given():
    assert made(copies=0) == ([], [0, 0, 0])
    forget = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2], "expert": 1}])
    assert router_texts(forget, forget, None, 3, list, "text", 0) == ([], [0])


def test_without_a_subject_there_are_no_copies():
    texts = made(rows=[("what is ill?", "nothing is."), ("is it?", "yes.")])
    assert COUNTERFACTUAL not in {text.expert for text in texts.beside}
    assert {text.expert for text in texts.beside} == {1, GENERAL, RETAIN}


def test_many_rows_to_forget_have_fewer_copies(monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.counterfactuals.MOST_TOKENS", 400)
    texts = made(copies=6, rows=ROWS * 10)
    total = sum(len(text.ids) for text in texts.beside if text.expert == COUNTERFACTUAL and text.start < 60)
    assert 0 < total <= 800
