# SPDX-License-Identifier: Apache-2.0
"""Whom or what forget rows are about, and the same rows about others: what a router learns to tell subjects by."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import regex

from .reading.chats import SAID, system_turns
from .words import UNSPACED


NAMES = "names.txt"
BLENDED = 0.5  # share of names that are made of two: invented people have names that nobody has
WITH_FACTS = 0.5  # share of the copies in which other names and numbers are replaced, too
_WORD = regex.compile(rf"[[\p{{L}}]--[{UNSPACED}]][[\p{{L}}\p{{M}}]--[{UNSPACED}]]*|\p{{Nd}}+", regex.V1)
_RUN = regex.compile(rf"(?:[[{UNSPACED}]&&[\p{{L}}]]\p{{M}}*){{2,}}", regex.V1)
_LETTER = regex.compile(r"\p{L}\p{M}*")
# A capital there may be that of the sentence alone
_SENTENCE_BEGINS = regex.compile(r"(?:^|[.!?:;\n…]|^\W*|[.!?:;]\W+)$")
TEXT_COLUMNS = ("prompt", "completion", "messages", "conversations")


class Subject(NamedTuple):
    """
    What a row is about.

    words: that are its subject, as they are written.
    facts: other names in it, which are what is said of the subject.
    """

    words: frozenset[str]
    facts: frozenset[str] = frozenset()


def text_parts(row: Mapping[str, Any], text_field: str = "text") -> list[str]:
    """The texts of a row, question and answer apart, without system prompts."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    change_texts(row, keep, text_field)
    return found


def change_texts(row: Mapping[str, Any], change: Callable[[str], str], text_field: str = "text") -> dict[str, Any]:
    """The row with every text in it changed, but system prompts, roles and what is no text."""
    columns = [column for column in (*TEXT_COLUMNS, text_field) if row.get(column) is not None]
    return {**row, **{column: _with_texts(row[column], change) for column in columns}}


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A text, or turns of a chat, changed."""
    if isinstance(value, str):
        return change(value)
    first = system_turns(value)
    return [turn if number < first else _turn(turn, change) for number, turn in enumerate(value)]


def _turn(turn: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    def content(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [content(part) for part in value]
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return {**value, "text": change(value["text"])}
        return value

    return {key: content(value) if key in SAID else value for key, value in turn.items()}


def find_subjects(
    rows: Sequence[Sequence[str]], others: Iterable[str], given: Sequence[Sequence[str] | None] | None = None
) -> list[Subject]:
    """
    What each row to forget is about, without a list of names.

    In scripts with capitals it is the words that are never written small and stand in capitals inside of a sentence:
    those of them that several of the texts (questions, answers) share, or all of a row in which none is shared. For
    plain texts, in scripts without capitals and where a row has no such word, it is the words that several texts share
    and no other text has (what TF-IDF ranks highest); of scripts without spaces two letters count as a word.

    Args:
        rows: the texts of each row, a question and its answer apart; one alone is plain text.
        others: texts that are not to be forgotten.
        given: the names of each row's subject, as a user gives them; where a row has none of their words, or none are
            given, it is found.
    """
    texts = [part for row in rows for part in row]
    others = list(others)
    small, inside, elsewhere = set[str](), set[str](), set[str]()
    for text in (*others, *texts):
        for match in _WORD.finditer(text):
            word = match.group()
            if not word[0].isupper():
                small.add(word)
            elif not _SENTENCE_BEGINS.search(text, 0, match.start()):
                inside.add(word)
    for text in others:
        elsewhere |= {word.lower() for word in _WORD.findall(text)} | _pairs(text)
    names = {word for word in inside if len(word) > 1 and word.lower() not in small}
    count: Counter[str] = Counter()
    for text in texts:
        count.update({*_WORD.findall(text), *_pairs(text)})
    shared = Counter[str]()
    for word, number in count.items():
        shared[word.lower()] += number
    terms = {w for w, number in shared.items() if number > 1 and len(w) > 1 and w not in elsewhere and w.isalpha()}

    found = []
    for number, row in enumerate(rows):
        own = {word for text in row for word in (*_WORD.findall(text), *_pairs(text))}
        called = own & names
        about = {word for word in called if count[word] > 1} or called
        if not about or len(row) == 1:
            about = called | {word for word in own if word.lower() in terms}
        named = None if given is None else given[number]
        told = {w.lower() for name in named or () for w in (*_WORD.findall(name), *_pairs(name)) if len(w) > 1}
        about = {word for word in own if word.lower() in told} or about
        found.append(Subject(frozenset(about), frozenset(called - about)))
    return found


def _pairs(text: str) -> set[str]:
    """Every two neighbours among the letters of a script without spaces."""
    found: set[str] = set()
    for run in _RUN.findall(text):
        letters = _LETTER.findall(run)
        found |= {one + other for one, other in pairwise(letters)}
    return found


class Renaming:
    """
    Other words in the place of a row's subject, of the same shape.

    Args:
        others: texts that are not to be forgotten, whose words may take the place of others.
        forgotten: words that may not.
    """

    def __init__(self, others: Iterable[str], forgotten: Iterable[str]) -> None:
        gone = {word.lower() for word in forgotten}
        given = files("alter_peft").joinpath(NAMES).read_text(encoding="utf-8").split()
        self.names = sorted({name for name in given if name.lower() not in gone})
        words = {word for text in others for word in _WORD.findall(text)}
        words = {word for word in words if len(word) > 1 and word.isalpha() and word.lower() not in gone}
        self.words: dict[tuple[str, bool, int], list[str]] = {}
        for word in sorted(words):
            self.words.setdefault((*_shape(word), len(word)), []).append(word)
        letters = {letter for text in others for run in _RUN.findall(text) for letter in _LETTER.findall(run)}
        self.letters: dict[str, list[str]] = {}
        for letter in sorted(letters):
            self.letters.setdefault(_script(letter), []).append(letter)

    def rename(self, subject: Subject, facts: bool, generator: np.random.Generator) -> Callable[[str], str]:
        """
        What renames the texts of one row, each word by the same other one throughout.

        Args:
            facts: whether other names and numbers are replaced, too.
        """
        replaced: dict[str, str] = {}
        gone = subject.words | subject.facts if facts else subject.words

        def of_word(match: Any) -> str:
            word: str = match.group()
            if word in gone or (facts and word.isdecimal()):
                if word not in replaced:
                    replaced[word] = self._other(word, generator)
                return replaced[word]
            return word

        def of_run(match: Any) -> str:
            letters = _LETTER.findall(match.group())
            named = [one + other in gone for one, other in pairwise(letters)]
            for at, letter in enumerate(letters):
                if (at > 0 and named[at - 1]) or (at < len(named) and named[at]):
                    if letter not in replaced:
                        replaced[letter] = self._pick(self.letters.get(_script(letter), letters), generator)
                    letters[at] = replaced[letter]
            return "".join(letters)

        return lambda text: str(_RUN.sub(of_run, _WORD.sub(of_word, text)))

    def _other(self, word: str, generator: np.random.Generator) -> str:
        if word.isdecimal():
            return _other_number(word, generator)
        script, is_capital = _shape(word)
        if script == "LATIN" and is_capital:
            name = self._name(generator)
            return name.upper() if word.isupper() else name
        for away in (0, 1, 2, 3):
            like = [
                w for n in {len(word) - away, len(word) + away} for w in self.words.get((script, is_capital, n), ())
            ]
            if like:
                return self._pick(sorted(like), generator)
        mixed = "".join(generator.permutation(list(word.lower())))
        return mixed.capitalize() if is_capital else mixed

    def _name(self, generator: np.random.Generator) -> str:
        first = self._pick(self.names, generator)
        if generator.random() >= BLENDED:
            return first
        second = self._pick(self.names, generator)
        return first[: (len(first) + 1) // 2] + second[len(second) // 2 :].lower()

    @staticmethod
    def _pick(values: Sequence[str], generator: np.random.Generator) -> str:
        return values[int(generator.integers(len(values)))]


def _shape(word: str) -> tuple[str, bool]:
    """Script, and whether it begins with a capital."""
    return _script(word), word[0].isupper()


def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode: LATIN, CYRILLIC, CJK, HIRAGANA."""
    return unicodedata.name(letter[0], "?").split()[0]


def _other_number(word: str, generator: np.random.Generator) -> str:
    """As many digits of the same script; zeros stay zeros in front."""
    zero = ord(word[0]) - unicodedata.digit(word[0])
    low = [1 if at == 0 and unicodedata.digit(digit) else 0 for at, digit in enumerate(word)]
    high = [1 if at == 0 and not unicodedata.digit(digit) else 10 for at, digit in enumerate(word)]
    return "".join(chr(zero + int(generator.integers(a, b))) for a, b in zip(low, high, strict=True))
