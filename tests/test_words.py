# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 (letters of other scripts)
"""Words of any script: what a model recites word for word has ROUGE 1, and English figures are rouge-score's."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from alter_peft.evaluation import Pair
from alter_peft.evaluation.attacks.asking_otherwise import first_third_given
from alter_peft.evaluation.metrics.text import bleu, rouge_l, unique_tokens
from alter_peft.subdomains import discover_subdomains
from alter_peft.words import counted, pieces, spaced, terms, words


RECITED = {  # a text, its words, and one without half of them
    "Chinese": ("爱丽丝住在巴黎。", list("爱丽丝住在巴黎"), "爱丽丝住"),
    "Japanese": ("アリスは3月パリへ。", ["ア", "リ", "ス", "は", "3", "月", "パ", "リ", "へ"], "アリスは3"),
    "Thai": ("อลิซอยู่ที่", ["อ", "ลิ", "ซ", "อ", "ยู่", "ที่"], "อลิซ"),
    "Arabic": ("تعيش أليس في باريس.", ["تعيش", "أليس", "في", "باريس"], "تعيش أليس"),
    "Hebrew": ("אליס גרה בפריז, כן", ["אליס", "גרה", "בפריז", "כן"], "אליס גרה"),
    "Cyrillic": ("Алиса живёт в Париже.", ["алиса", "живёт", "в", "париже"], "Алиса живёт"),
    "Greek": ("Η Αλίκη ζει εκεί", ["η", "αλίκη", "ζει", "εκεί"], "Η Αλίκη"),
    "Hindi": ("ऐलिस पेरिस में है।", ["ऐलिस", "पेरिस", "में", "है"], "ऐलिस पेरिस"),
    "Korean": (
        "앨리스는 파리에 살아요 API를",
        ["앨리스는", "파리에", "살아요", "api", "를"],
        "앨리스는 파리에 살아요",
    ),
    "Armenian": ("Ալիսն ապրում է Փարիզում", ["ալիսն", "ապրում", "է", "փարիզում"], "Ալիսն ապրում"),
    "accents alone": ("Ö à é?", ["ö", "à", "é"], "Ö"),
}


@pytest.mark.parametrize("script", RECITED)
def test_what_is_recited_in_any_script_has_rouge_and_bleu_of_1(script):
    text, expected, half = RECITED[script]
    assert words(text) == expected
    for kind in ("recall", "precision", "fmeasure"):
        assert rouge_l([text], [text], kind) == rouge_l([text], [text], kind, use_stemmer=False) == [1.0]
    assert rouge_l([half], [text]) == [len(words(half)) / len(expected)] and 0 < rouge_l([half], [text])[0] < 1
    assert rouge_l(["Something else."], [text]) == [0.0]
    if find_spec("sacrebleu") and (len(text.split()) >= 4 or len(expected) > 5):  # BLEU is of four words together
        assert bleu([text], [text]) == pytest.approx([1.0])


def test_a_reference_without_a_word():
    assert rouge_l(["🙂", "?", ""], ["🙂", "🙂", "🙂"]) == [1.0, 0.0, 0.0]


ENGLISH = [
    "Alice lives in Paris, near the old bridge; isn't she 37?",
    "",
    "   ",
    "a_b-c d.e",
    "The caf\u00e9 of Jos\u00e9's na\u00efve friends",
    "cafe\u0301 in NFD",
    "H\u2082O, 5 m\u00b2, \u201cquoted\u201d \u2014 running runner runs",
    "\ufb01nd UPPER Case Words 1,000",
]


def test_words_of_latin_letters_are_those_of_rouge_score():
    tokenize = pytest.importorskip("rouge_score.tokenize").tokenize
    for text in ENGLISH:
        assert words(text) == tokenize(text, None)


def test_figures_of_english_texts_are_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for stems in (True, False):
        theirs = scorer.RougeScorer(["rougeL"], use_stemmer=stems)
        for reference in ENGLISH:
            expected = [theirs.score(reference, answer)["rougeL"].recall for answer in ENGLISH]
            if words(reference):
                assert rouge_l(ENGLISH, [reference] * len(ENGLISH), use_stemmer=stems) == expected


def test_unique_tokens_of_any_script():
    assert unique_tokens(["好好好好好好好好好好", "我在巴黎", "สวัสดี", "да да да да"]) == [0.1, 1.0, 0.75, 0.25]
    for text in ENGLISH:
        assert unique_tokens([text]) == [len({*text.lower().split()}) / max(1, len(text.split()))]


def test_pieces_and_terms_of_spaced_scripts_are_as_before():
    for text in ENGLISH:
        assert [text[start:end] for start, end in pieces(text)] == re.findall(r"\S+", text)
        if "\u0301" not in text:
            assert terms(text) == re.findall(r"(?u)\b\w\w+\b", text)
        assert spaced(text) == text
    assert [*terms("हिन्दी में"), *terms("住在巴黎，好 ok a")] == ["हिन्दी", "में", "住在", "在巴", "巴黎", "好", "ok"]


def test_a_third_of_an_answer_without_spaces():
    pair = first_third_given(Pair("？", "爱丽丝住在巴黎", wrong=("鲍勃住在罗马了吗",)))
    assert (pair.given, pair.completion, pair.wrong) == ("爱丽", "丝住在巴黎", (" 住在罗马了吗",))


def test_sub_domains_of_texts_without_spaces():
    topics = ("爱丽丝住在巴黎的老桥旁边", "面包师用黑麦和蜂蜜烤面包")
    texts = [f"{topics[i % 2]}，第{number}次。" for i, number in enumerate("一二三四五六七八九十甲乙")]
    labels, _ = discover_subdomains(texts)
    assert labels == [0, 1] * 6


@pytest.mark.parametrize(
    "count, noun, said",
    [(0, "row", "0 rows"), (1, "step", "1 step"), (1.0, "epoch", "1 epoch"), (1.5, "epoch", "1.5 epochs")],
)
def test_a_number_and_what_it_counts(count, noun, said):
    assert counted(count, noun) == said
