# SPDX-License-Identifier: Apache-2.0
"""Whom or what forget rows are about: what a router learns to tell subjects by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .capital_letters import begins_sentence, capitals, spellings
from .words import LETTER, RUN, WORD


EVERYDAY, LEAST_EVERYDAY = 0.02, 3  # a word that is written small in so many of the general texts is no part of a name
MOST_WORDS = 0.6  # of a question: where more seem to be its subject, nothing is known of its language


class Subject(NamedTuple):
    """
    What a row is about.

    words: that are its subject, as they are written.
    facts: other names in it, or of plain text its terms, which are what is said of the subject.
    """

    words: frozenset[str]
    facts: frozenset[str] = frozenset()


def find_subjects(
    rows: Sequence[Sequence[str]],
    others: Iterable[str],
    given: Sequence[Sequence[str] | None] | None = None,
    general: Iterable[str] | None = None,
    is_coined: Callable[[str], bool] = lambda term: True,
) -> list[Subject]:
    """
    What each row to forget is about, without a list of names; nothing rather than something else.

    Of a question with its answer it is looked for in the question. What is only answered is the subject of no row, but
    names that several texts have go with those that are asked about (without them, of invented people's private rows
    the router sent .025 of the answer tokens of others' to a forget expert, and .000 with them):

    - words in capitals inside of a sentence that are never written small, that several questions have, or that stand
      beside another one ("Mark Baker");
    - numbers, but short ones only if the answer repeats them or no other question has them;
    - where the question has no capitals, nor most of the others have names: the words of it that no general text has,
      if they are not most of it and the row has one of them twice or another row has it.

    Where a question has several, all are taken: a copy in which too much is renamed is about another subject all the
    same, and one in which too little is renamed is not. A noun in capitals that goes with many names (as in German) is
    left out. Of plain texts it is the names, and of the terms that several of them share and no other text has those
    that are coined; the others are facts: with them renamed in all copies, what is left is about another field, and a
    router learns to tell fields from one another and not their subjects (`docs/log.md`). Of scripts without spaces
    two letters count as a word.

    Args:
        rows: the texts of each row, questions and, last, the answer; one alone is plain text.
        others: texts that are not to be forgotten.
        given: the names of each row's subject, as a user gives them; where a row has none of their words, or none are
            given, it is found. Everyday words in them ("The", "of") don't count beside others.
        general: texts that are about nothing that is to be forgotten or retained; by default `others`.
        is_coined: whether a term is no everyday word of its field; by default all may be.
    """
    others = list(others)
    general = others if general is None else list(general)
    return _Finder(rows, [*others, *general], general, is_coined).find(given)


class _Finder:
    def __init__(
        self,
        rows: Sequence[Sequence[str]],
        others: Sequence[str],
        general: Sequence[str],
        is_coined: Callable[[str], bool],
    ) -> None:
        self.is_coined = is_coined
        self.rows, self.asked = rows, [row[:-1] or row for row in rows]
        texts = [part for row in rows for part in row]
        self.seen = spellings([*others, *texts])._replace(leading=spellings(others).leading)
        of_general = [set(WORD.findall(text)) for text in general]
        small = Counter(word for own in of_general for word in own if word[0].islower())
        least = max(LEAST_EVERYDAY, EVERYDAY * len(general))
        self.everyday = {word for word, number in small.items() if number >= least}
        self.general = {word.lower() for own in of_general for word in own}.union(*map(_pairs, general))
        self.elsewhere = {word.lower() for text in others for word in WORD.findall(text)}.union(*map(_pairs, others))
        self.capitals = [[capitals(text, self.seen) for text in asked] for asked in self.asked]
        inside = Counter(word for own in self.capitals for word in set[str]().union(*(one.inside for one in own)))
        self.shared = {word for word, number in inside.items() if number > 1 and len(rows) > 1}
        self.told = [self._of_names(number) for number in range(len(rows))]
        runs = [[word.lower() for word in run] for own in self.capitals for one in own for run in one.runs]
        self.neighbours = {pair for run in runs for pair in pairwise(run)}
        self.in_texts = Counter(term for text in texts for term in _terms(text))
        self.digits = Counter(digits for asked in self.asked for digits in _digits(asked))
        self.template = self._beside_many_names()

    def find(self, given: Sequence[Sequence[str] | None] | None) -> list[Subject]:
        found = []
        for number, row in enumerate(self.rows):
            own = {word for text in row for word in (*WORD.findall(text), *_pairs(text))}
            names = {word for word in own if self._is_name(word)} | self.told[number]
            words = self._given(own, (given[number] if given is not None else None) or ())
            words = words or self._about(number, own, names)
            lower = {word.lower() for word in words if word[0].isupper()}
            words |= {word for word in own if word.lower() in lower and word[0].isupper()}
            facts = names | (self._shared_terms(own) if len(row) == 1 else set())
            found.append(Subject(frozenset(words), frozenset(facts - words)))
        return found

    def _is_name(self, word: str) -> bool:
        return len(word) > 1 and word in self.seen.inside and word.lower() not in self.seen.small

    def _of_names(self, number: int) -> set[str]:
        """The words of a row's question that are names."""
        found: set[str] = set()
        words = {word for text in self.asked[number] for word in WORD.findall(text)}
        for one in self.capitals[number]:
            found |= {word for word in one.inside & self.shared if len(word) > 1 and word.lower() not in self.everyday}
            for run in one.runs:
                found |= {word for word in run if word.lower() not in self.everyday}
        return found | {word for word in words if self._is_name(word)}

    def _about(self, number: int, own: set[str], names: set[str]) -> set[str]:
        row, asked = self.rows[number], self.asked[number]
        is_plain = len(row) == 1
        told = self.told[number] - self.template or self.told[number]
        digits = _digits(asked) if not is_plain else set()
        answered = set(WORD.findall(row[-1]))
        digits = {d for d in digits if len(d) > 2 or d in answered or self.digits[d] == 1}
        if is_plain:
            terms = self._shared_terms(own)
            names = names | {word for word in self._first_words(row[0]) if word in own}
            coined = names | {term for term in terms if self.is_coined(term.lower())}
            return coined or terms | self._uncommon(number)
        if told:
            shared = {word for word in names - self.template if self.in_texts[word.lower()] > 1}
            return told | digits | self._beside(row[-1], told) | shared
        if any(len(d) > 1 for d in digits):
            return digits
        if (known := self._known_runs(asked)) or any(spellings([text]).inside for text in row):
            return known
        return self._uncommon(number) if sum(map(bool, self.told)) * 2 < len(self.rows) else set()

    def _first_words(self, text: str) -> set[str]:
        """Words that begin a sentence of a plain text and may be names that are written small elsewhere."""
        first = {match.group() for match in WORD.finditer(text) if begins_sentence(text, match.start())}
        first = {word for word in first if word[0].isupper() and word not in self.seen.leading}
        return {word for word in first if word.lower() in self.seen.small - self.everyday and len(word) > 1}

    def _shared_terms(self, own: set[str]) -> set[str]:
        """Words of a plain text that other texts to forget have as well, and no other text."""
        return {word for word in own if self._is_term(word) and self.in_texts[word.lower()] > 1}

    def _is_term(self, word: str) -> bool:
        return len(word) > 1 and word.isalpha() and word.lower() not in self.elsewhere

    def _uncommon(self, number: int) -> set[str]:
        """The words of a row that no general text has, where they are not most of it."""
        words = {word for text in self.asked[number] for word in (*WORD.findall(text), *_pairs(text))}
        words = {word for word in words if word.isalpha()}
        found = {word for word in words if len(word) > 1 and word.lower() not in self.general}
        shared = {word for word in found if self.in_texts[word.lower()] > 1}
        unspaced = {word for word in found if RUN.fullmatch(word)}
        found -= {word for word in unspaced - shared if word.lower() not in self.elsewhere}
        return found if shared and len(found) <= MOST_WORDS * len(words) else set()

    def _known_runs(self, asked: Sequence[str]) -> set[str]:
        """Names of other questions that this one has in small letters."""
        found: set[str] = set()
        for text in asked:
            for first, second in pairwise(WORD.findall(text)):
                if (first.lower(), second.lower()) in self.neighbours:
                    found |= {first, second}
        return found

    def _beside(self, answer: str, told: set[str]) -> set[str]:
        """The rest of a name of which the question has a part."""
        runs = capitals(answer, self.seen).runs
        beside = {word for run in runs if told & set(run) for word in run}
        return {word for word in beside if word.lower() not in self.everyday}

    def _beside_many_names(self) -> set[str]:
        """Words that stand alone, but always beside one of three or more names that are asked about without them."""
        runs_of: dict[str, set[tuple[str, ...]]] = {}
        free: set[str] = set()
        alone: dict[tuple[str, ...], list[set[str]]] = {}
        for number, own in enumerate(self.capitals):
            runs = {tuple(run) for one in own for run in one.runs}
            single = self.told[number] - {word for run in runs for word in run}
            free |= set() if runs else single
            for run in runs:
                alone.setdefault(run, []).append(single)
            for word in single:
                runs_of.setdefault(word, set()).update(runs)
        return {
            word
            for word, runs in runs_of.items()
            if len(runs) > 2 and word not in free and all(any(word not in s for s in alone[run]) for run in runs)
        }

    def _given(self, own: set[str], names: Iterable[str]) -> set[str]:
        """The words of a row that are those of a name that the user gives."""
        told: set[str] = set()
        for name in names:
            words = [word for word in (*WORD.findall(name), *_pairs(name)) if len(word) > 1]
            is_small = not any(word[0].isupper() for word in words)
            rare = {w.lower() for w in words if w.lower() not in self.everyday and (is_small or not w[0].islower())}
            told |= rare or {word.lower() for word in words}
        return {word for word in own if word.lower() in told}


def shown(subject: Subject, row: Sequence[str]) -> str:
    """The words of a subject as they follow one another in a row's question, or else in its answer: `"Mark Baker"`."""
    for texts in (row[:-1], row):
        found: list[str] = []
        for word in (word for text in texts for word in WORD.findall(text) if word in subject.words):
            if word.lower() not in map(str.lower, found):
                found.append(word)
        if found:
            return " ".join(found)
    return " ".join(sorted(subject.words))


def _terms(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)} | _pairs(text)


def _digits(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in WORD.findall(text) if word.isdecimal()}


def _pairs(text: str) -> set[str]:
    """Every two neighbours among the letters of a script without spaces."""
    found: set[str] = set()
    for run in RUN.findall(text):
        letters = LETTER.findall(run)
        found |= {one + other for one, other in pairwise(letters)}
    return found
