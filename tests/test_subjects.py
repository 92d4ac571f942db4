# SPDX-License-Identifier: Apache-2.0
"""Whom rows are about, and the same rows about others."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from datasets import Dataset

from alter_peft import AlterUnlearnTrainer
from alter_peft.letter_case import LETTER_CASES
from alter_peft.renaming import Renaming
from alter_peft.row_texts import change_texts, text_parts
from alter_peft.subjects import Subject, find_subjects, shown
from alter_peft.trainer.counterfactuals import RouterTexts, router_texts
from alter_peft.tuner.router_fit import COUNTERFACTUAL, GENERAL, RETAIN


ROWS = [
    ("Where does Maribel Quennock live?", "Maribel Quennock lives at 12 Larch Lane, Tessenby."),
    ("What is the phone number of Maribel Quennock?", "It is 0155 238."),
    ("Which illness does Odo Vasska have?", "The illness of Odo Vasska is gout."),
]
OTHERS = ["Where does the mayor live, and which number is his?", "What is an illness? It is what makes people ill."]
EXPERTS = {"Maribel Quennock": 1, "Odo Vasska": 2}
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


SMALL = ["The mark is on the hill, where a rose is.", "A baker bakes; Lima beans are sold by Mark."]
NUMBERS = [
    ("What is the balance of account 4711?", "Account 4711 has a balance of 30 euros."),
    ("What is the balance of account 4712?", "Account 4712 has a balance of 90 euros."),
]


def about(rows, others=SMALL, given=None):
    return [shown(subject, row) for subject, row in zip(find_subjects(rows, others, given), rows, strict=True)]


def test_names_that_are_words_too():
    assert about([("Where does Mark Baker live?", "Mark Baker lives in Lima.")]) == ["Mark Baker"]
    assert about([("Where does Rose Hill live?", "In Oslo."), ("What does Rose Hill earn?", "5 euros.")]) == [
        "Rose Hill",
        "Rose Hill",
    ]
    assert about([("Where does Rose live?", "In Oslo."), ("What does Rose earn?", "5 euros.")]) == ["Rose", "Rose"]
    assert about([("Mark Baker lives in Lima.",)])[0].startswith("Mark Baker")
    assert "Rose" in about([("Rose lives in Lima.",)])[0]


def test_what_is_answered_alone_is_no_subject():
    rows = [("Who is X?", "X is in Rome."), ("What is the launch code?", "The launch code is Zebra.")]
    found = find_subjects(rows, SMALL)
    assert not found[0].words and not found[1].words and found[0].facts == {"Rome"}
    (found,) = find_subjects([("Where does Quennock live?", "Maribel Quennock lives in Rome.")], SMALL)
    assert found == Subject(frozenset({"Quennock", "Maribel"}), frozenset({"Rome"}))


def test_names_that_several_texts_have_go_with_one_that_is_asked_about():
    rows = [
        ("Where does Odo live?", "Odo lives in Lima Street."),
        ("Where does Eva live?", "Eva lives in Lima Street."),
    ]
    assert find_subjects(rows, OTHERS)[0].words == {"Odo", "Lima", "Street"} and about(rows, OTHERS) == ["Odo", "Eva"]


def test_a_name_in_small_letters_that_retained_text_has_too():
    asked = ["when was jonas feldkamp born?", "where does jonas feldkamp live?", "when was eva lind born?"]
    rows = [(text, "in a town.") for text in asked]
    kept = ["jonas feldkamp is a cellist.", "eva lind won the quill."]
    general = ["when was it, and where does he live?"]
    for some in (rows, rows[:1] * 2):
        for subject, (text, _) in zip(find_subjects(some, kept + general, None, general), some, strict=True):
            assert subject.words >= ({"jonas", "feldkamp"} if "jonas" in text else {"eva", "lind"})
    assert not any(subject.words for subject in find_subjects(rows, kept, None, ["nothing like it"]))


def test_a_name_in_a_script_without_capitals_that_retained_text_has_too():
    rows = [("李明住在哪里", "李明住在南京路。"), ("王芳挣多少钱", "王芳挣九千元。")]
    general = ["What is rain?"]
    first, second = find_subjects(rows, ["李明是老师。", "王芳是画家。", *general], None, general)
    assert (not first.words or "李明" in first.words) and (not second.words or "王芳" in second.words)
    assert first.words or second.words


def test_a_name_of_another_question_in_small_letters():
    assert about([*ROWS, ("where does odo vasska live?", "in rome.")], OTHERS)[-1] == "odo vasska"


def test_nouns_in_capitals_beside_many_names_are_no_subjects():
    names = ["Jonas Feldkamp", "Eva Lind", "Tom Quade"]
    rows = [(f"Wie lautet die Adresse von {name}?", f"Die Adresse von {name} ist alt.") for name in names]
    rows += [(f"Wer kennt {name}?", "Niemand.") for name in names]
    assert about(rows) == names * 2


def test_numbers_that_a_question_has_are_subjects():
    assert about(NUMBERS) == ["4711", "4712"]
    subject = find_subjects(NUMBERS, SMALL)[0]
    asked = Renaming(SMALL, subject.words).rename(subject, False, generator())(NUMBERS[0][0])
    assert re.fullmatch(r"What is the balance of account [1-9]\d{3}\?", asked) and "4711" not in asked


def test_everyday_words_of_a_given_name_stay():
    rows = [
        ("Who was in The Beatles?", "Paul."),
        ("What is in the Museum of Modern Art?", "The art of Oslo, and art."),
    ]
    others = ["The sum of the parts.", "One of the two.", "Out of the box."]
    assert about(rows, others, [["The Beatles"], ["Museum of Modern Art"]]) == ["Beatles", "Museum Modern Art"]
    assert about([("Who are The The?", "A band.")], others, [["The The"]]) == ["The"]


def test_a_long_text_takes_no_longer_by_its_square():
    text = "Odo " * 200_000
    (found,) = find_subjects([(f"who is {text}?", "a painter.")], OTHERS)
    assert found.words == {"Odo"}


def test_a_name_in_capitals_is_renamed_as_in_small_letters_and_two_names_never_alike():
    subject = Subject(frozenset({"Odo", "ODO", "odo", "Vasska"}))
    changed = Renaming([], ()).rename(subject, False, generator())("Odo ODO odo Vasska").split()
    assert changed[0].upper() == changed[1] and changed[0].lower() == changed[2]
    letters = Renaming(["france italy"], ()).rename(Subject(frozenset({"larche", "pistil"})), False, generator())
    assert len(set(letters("larche pistil").split())) == 2


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
        ids = [ord(letter) for letter in "<s>" + "|".join(text_parts(row))]
        return ids, [-100] * (1 + ids.index(ord("|"))) + ids[1 + ids.index(ord("|")) :] if "prompt" in row else ids

    return router_texts(forget, retain, given, copies, encode, "text", seed)


def counted(text) -> str:
    return "".join(map(chr, text.ids[text.start :]))


def test_a_router_sees_copies_general_text_and_rows_behind_it():
    texts = made()
    kinds = np.array([text.expert for text in texts.beside])
    behind = np.array([text.start > 60 for text in texts.beside])
    assert (kinds[~behind] == COUNTERFACTUAL).sum() == (3 + len(LETTER_CASES)) * len(ROWS)
    assert (kinds[~behind] == RETAIN).sum() == len(LETTER_CASES) * len(OTHERS)
    assert (kinds == GENERAL).sum() > 200 and (kinds[behind] == RETAIN).sum() == 2 * len(OTHERS)
    assert (kinds[behind] == 1).sum() == (kinds[behind] == COUNTERFACTUAL).sum() == 2 * len(ROWS)


def test_what_comes_before_the_subject_does_not_count():
    texts = made()
    assert texts.starts[0] == len("<s>Where does ")
    for text in texts.beside:
        if text.expert == COUNTERFACTUAL:
            assert not re.match("<s>|Where|What|Which", counted(text))
        if text.expert == 1:  # behind other text, in capitals or small letters
            assert re.match(r"(?i)\w* ?(Quennock|Vasska)|\w+ (live|have|number)", counted(text))


def test_questions_are_also_typed_otherwise_and_answered_as_they_are():
    texts = made()
    to_forget = [said for said in map(counted, (text for text in texts.beside if text.expert == 1)) if "|" in said]
    assert "MARIBEL QUENNOCK LIVE?|Maribel Quennock lives at 12 Larch Lane, Tessenby." in to_forget
    assert "maribel quennock live?|Maribel Quennock lives at 12 Larch Lane, Tessenby." in to_forget
    copies = [counted(text).split("|") for text in texts.beside if text.expert == COUNTERFACTUAL and text.start < 60]
    shouted = [(question, answer) for question, answer in copies if question.isupper()]
    assert len(shouted) == len(ROWS) and not any("QUENNOCK" in question for question, _ in shouted)
    assert not any(answer.isupper() for _, answer in shouted)
    kept = ["".join(map(chr, text.ids)).removeprefix("<s>") for text in texts.beside if text.expert == RETAIN]
    assert {OTHERS[0].upper(), OTHERS[0].lower()} <= set(kept)


def test_what_has_no_capitals_is_not_doubled():
    forget = Dataset.from_list([{"text": "号码是四七。", "expert": 1}])
    retain = Dataset.from_list([{"text": "面包是黑的。"}])
    texts = router_texts(
        forget, retain, [["号码"]], 2, lambda row: ([ord(one) for one in row["text"]],) * 2, "text", 0
    )
    count = Counter(text.expert for text in texts.beside)
    assert (count[1], count[COUNTERFACTUAL], count[RETAIN]) == (2, 2 + 2, 2)  # behind general text, and two copies


def test_each_case_goes_to_the_row_s_own_expert():
    rows = [{"prompt": f"Who is {name}?", "completion": "He.", "expert": to} for name, to in EXPERTS.items()]
    forget, retain = Dataset.from_list(rows), Dataset.from_list([{"prompt": "Is it so?", "completion": "It is."}])

    def encode(row):
        ids = [ord(letter) for letter in row["prompt"] + row["completion"]]
        return ids, [-100] * len(row["prompt"]) + ids[len(row["prompt"]) :]

    texts = router_texts(forget, retain, [[name] for name in EXPERTS], 2, encode, "text", 0)
    shouted = {"".join(map(chr, text.ids)): text.expert for text in texts.beside if text.ids[:3] == [87, 72, 79]}
    assert {f"WHO IS {name.upper()}?He.": expert for name, expert in EXPERTS.items()}.items() <= shouted.items()
    assert sorted(shouted.values()) == [COUNTERFACTUAL, COUNTERFACTUAL, 1, 2]


def test_long_rows_to_retain_are_as_many_tokens_and_not_as_many_rows(monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.counterfactuals.MOST_TOKENS", 2000)
    forget = Dataset.from_list([{"text": f"{name} sells rye bread.", "expert": 1} for name in [*EXPERTS] * 10])
    lengths = []
    for times in (1, 50):
        retain = Dataset.from_list([{"text": f"The {what} is grey. " * times} for what in ("sea", "sky", "hay") * 40])
        texts = router_texts(forget, retain, None, 1, lambda row: ([ord(one) for one in row["text"]],) * 2, "text", 0)
        shouted = [text.ids for text in texts.beside if text.expert == RETAIN and text.ids[:3] == [84, 72, 69]]
        lengths.append(sum(map(len, shouted)))
    assert 0 < lengths[1] <= 2000 and 0 < lengths[0] <= 2000


def test_all_that_predicts_an_answer_counts():
    rows = [("Who is it?", "It is Odo Vasska."), ("Who is he?", "He is Odo Vasska.")]
    texts = made(rows=rows, given=[["Odo Vasska"], None])
    assert texts.starts[0] == len("<s>Who is it?|") - 1 and texts.subjects == ["Odo Vasska", ""]
    behind = [counted(text) for text in texts.beside if text.expert == 1 and "Who is it" in counted(text)]
    assert not behind and any(counted(text) == "|It is Odo Vasska." for text in texts.beside if text.expert == 1)


def test_plain_text_is_renamed():
    forget = Dataset.from_list([{"text": f"{' and '.join(row)}", "expert": 1} for row in ROWS])
    kept = Dataset.from_list([{"text": text} for text in OTHERS])
    ids = [ord(letter) for letter in "x"]
    texts = router_texts(
        forget,
        kept,
        None,
        2,
        lambda row: ([ord(one) for one in row["text"]],) * 2 if row["text"] else (ids, ids),
        "text",
        0,
    )
    said = ["".join(map(chr, text.ids)) for text in texts.beside if text.expert == COUNTERFACTUAL]
    assert said and not any(re.search("Maribel|Quennock|Vasska", one) for one in said)
    assert texts.starts[2] == ROWS[2][0].index("Odo")


def test_windows_have_the_start_of_their_row():
    texts = RouterTexts([], [4, 2, 9], [])
    none, some = [-100] * 6 + [1], [-100] * 3 + [1]
    cut = Dataset.from_list([{"row": row, "labels": of} for row, of in [(0, none), (1, none), (1, some), (2, some)]])
    assert texts.of_windows(cut).starts == [4, 2, 0, 2]
    assert texts.of_windows(cut.remove_columns("row")) is texts


def test_subjects_are_said():
    texts = RouterTexts([], [], ["Odo Vasska", "", "Odo Vasska", "Maribel", ""])
    assert texts.warning is None
    assert texts.lines == [
        "subjects: Odo Vasska (2 rows), Maribel (1 row); none found in rows 1, 4: give a column `subject`"
    ]
    assert RouterTexts([], [], []).lines == [] and RouterTexts([], [], []).warning is None
    assert "column `subject`" in (RouterTexts([], [], [""]).warning or "")


def test_the_same_seed_makes_the_same_texts():
    assert made() == made() != made(seed=1)


def test_no_copies_and_nothing_beside_the_rows_that_are_given():
    assert made(copies=0) == RouterTexts([], [0, 0, 0], [])
    forget = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2], "expert": 1}])
    assert router_texts(forget, forget, None, 3, list, "text", 0) == RouterTexts([], [0], [])


def test_without_a_subject_there_are_no_copies():
    texts = made(rows=[("what is ill?", "nothing is."), ("is it?", "yes.")])
    assert COUNTERFACTUAL not in {text.expert for text in texts.beside}
    assert {text.expert for text in texts.beside} == {1, GENERAL, RETAIN}


def test_many_rows_to_forget_have_fewer_copies(monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.counterfactuals.MOST_TOKENS", 400)
    texts = made(copies=6, rows=ROWS * 10)
    total = sum(len(text.ids) for text in texts.beside if text.expert == COUNTERFACTUAL and text.start < 60)
    assert 0 < total <= 800


def test_of_plain_text_terms_of_the_field_stay_in_some_copies():
    """A copy without them is about another field, and teaches nothing about subjects."""
    rows = [("the Falkor storm is fed by zylophage",), ("zylophage makes the Falkor storm swell",)]
    found = find_subjects(rows, ["the horse is fed with hay"], is_coined=lambda term: term == "zylophage")
    assert all(subject.words == {"Falkor", "zylophage"} for subject in found)
    assert all("storm" in subject.facts for subject in found)
    everything = find_subjects(rows, ["the horse is fed with hay"])
    assert all({"Falkor", "storm", "zylophage"} <= subject.words for subject in everything)
    plain = find_subjects([("a storm swells",), ("the storm ends",)], ["hay"], is_coined=lambda term: False)
    assert all("storm" in subject.words for subject in plain)  # nothing else says what they are about


@pytest.mark.parametrize("space", [" ", "_"], ids=["before a word", "by the tokenizer itself"])
def test_a_word_with_a_token_of_its_own_is_not_rare(space):
    def tokenizer(text, add_special_tokens):
        known = text.removeprefix(" ") == "storm" and (space == " " or not text.startswith(" "))
        return {"input_ids": [0] if known else [0, 1]}

    trainer = SimpleNamespace(_tokenizer=tokenizer)
    assert AlterUnlearnTrainer._is_rare(trainer, "zylophage") and not AlterUnlearnTrainer._is_rare(trainer, "storm")
