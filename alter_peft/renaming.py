# SPDX-License-Identifier: Apache-2.0
"""Other names, words and numbers in the place of those of a row."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np

from .subjects import Subject
from .words import LETTER, RUN, WORD


NAMES = "names.txt"
BLENDED = 0.5  # share of names that are made of two: invented people have names that nobody has
WITH_FACTS = 0.5  # share of the copies in which other names and numbers are replaced, too
TRIES = 20  # for a word that the row does not have yet: where there are so few, one may be taken twice


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
        words = {word for text in others for word in WORD.findall(text)}
        words = {word for word in words if len(word) > 1 and word.isalpha() and word.lower() not in gone}
        self.words: dict[tuple[str, bool, int], list[str]] = {}
        for word in sorted(words):
            self.words.setdefault((*_shape(word), len(word)), []).append(word)
        letters = {letter for text in others for run in RUN.findall(text) for letter in LETTER.findall(run)}
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

        def another(word: str, make: Callable[[set[str]], str]) -> str:
            """Of a word in any case, one that no other word of the row has become, nor is."""
            if word not in replaced:
                used = {one.lower() for one in (*gone, *replaced, *replaced.values())}
                made = make(used)
                for _ in range(TRIES):
                    if made.lower() not in used:
                        break
                    made = make(used)
                replaced[word] = made
            return replaced[word]

        def of_word(match: Any) -> str:
            word: str = match.group()
            if word in gone or (facts and word.isdecimal()):
                return _in_case(another(word.lower(), lambda used: self._other(word, used, generator)), word)
            return word

        def of_run(match: Any) -> str:
            letters = LETTER.findall(match.group())
            named = [one + other in gone for one, other in pairwise(letters)]
            for at, letter in enumerate(letters):
                if (at > 0 and named[at - 1]) or (at < len(named) and named[at]):
                    of_script = self.letters.get(_script(letter), letters)
                    letters[at] = another(letter, self._picking(of_script, generator))
            return "".join(letters)

        return lambda text: str(RUN.sub(of_run, WORD.sub(of_word, text)))

    def _picking(self, of: Sequence[str], generator: np.random.Generator) -> Callable[[set[str]], str]:
        return lambda used: self._pick([one for one in of if one not in used] or of, generator)

    def _other(self, word: str, used: set[str], generator: np.random.Generator) -> str:
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
            if like := sorted(one for one in like if one.lower() not in used):
                return self._pick(like, generator)
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


def _in_case(made: str, word: str) -> str:
    """What was made of a word in any case, in the case of this one."""
    if word.isupper() and len(word) > 1:
        return made.upper()
    if word[0].isupper() == made[0].isupper():
        return made
    return made[0].upper() + made[1:] if word[0].isupper() else made.lower()


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
