# SPDX-License-Identifier: Apache-2.0
"""What capitals say: names, and beginnings of sentences."""

from __future__ import annotations

import pytest

from alter_peft.capital_letters import Capitals, begins_sentence, capitals, spellings


def test_words_are_told_by_how_they_are_written():
    seen = spellings(["Ask Odo. The mark is his: Then go.", "ALL IN CAPITALS"])
    assert seen.inside == {"Odo"} and {"mark", "is", "his", "go"} == seen.small
    assert seen.leading == {"The", "Then"}  # a word goes on small behind them, and none behind "Ask"


@pytest.mark.parametrize("text", ["HEADING WITH Odo Vasska", "4711"])
def test_where_nothing_is_small_capitals_say_nothing(text):
    assert capitals(text, spellings([text])) == Capitals(set(), [])


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("who is Odo Vasska?", [["Odo", "Vasska"]]),
        ("Odo Vasska lives here", [["Odo", "Vasska"]]),  # the first may begin a sentence
        ("meet Anne-Marie here", [["Anne", "Marie"]]),
        ("ask Dr. Odo", [["Dr", "Odo"]]),  # a title's full stop
        ("ask J. Vasska", [["Vasska"]]),  # an initial is no word to go by
        ("ask Odo, Vasska", []),
        ("meet Maribel. Then Vasska goes", []),
        ("meet Odo. Then Vasska goes", []),  # a short name is no title
    ],
)
def test_words_in_capitals_side_by_side_are_one_name(text, runs):
    assert capitals(text, spellings([text, "then"])).runs == runs


@pytest.mark.parametrize(
    ("text", "begins"), [("Odo", True), ('Go. "Odo', True), ("so Odo", False), ("list:\n- Odo", True), ("_Odo", False)]
)
def test_beginnings_of_sentences(text, begins):
    assert begins_sentence(text, text.index("Odo")) is begins
