# SPDX-License-Identifier: Apache-2.0
"""What capitals say of the words of a text: which are names, and which only begin a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .words import WORD


ENDS = ".!?:;\n…"  # a capital behind one of them may be that of a sentence alone
BETWEEN = (" ", "-")  # what stands between the words of one name
# What a full stop may follow within a name, beside initials
TITLES = frozenset("mr mrs ms mx dr prof st sr jr fr br rev hon lt col gen capt maj sgt".split())


class Spellings(NamedTuple):
    """
    What capitals say in all texts.

    small: words that are written small somewhere.
    inside: words that stand in capitals inside of a sentence.
    leading: words behind whose capital, at the beginning of a sentence, a word goes on small.
    """

    small: set[str]
    inside: set[str]
    leading: set[str]


class Capitals(NamedTuple):
    """
    The capitals of a text.

    inside: words in capitals inside of a sentence.
    runs: of two and more words in capitals that stand side by side, as in names; the first may begin a sentence.
    """

    inside: set[str]
    runs: list[list[str]]


def spellings(texts: Iterable[str]) -> Spellings:
    """How the words of all these texts are written."""
    seen = Spellings(set(), set(), set())
    for text in texts:
        matches = list(WORD.finditer(text))
        # where nothing is written small, as in headings, capitals say nothing
        has_small = any(match.group()[0].islower() for match in matches)
        for number, match in enumerate(matches):
            word = match.group()
            if not word[0].isupper():
                seen.small.add(word)
            elif not begins_sentence(text, match.start()):
                if has_small:
                    seen.inside.add(word)
            elif number + 1 < len(matches) and matches[number + 1].group()[0].islower():
                seen.leading.add(word)
    return seen


def capitals(text: str, seen: Spellings) -> Capitals:
    """
    Those of a text; none of one in which nothing is written small.

    Args:
        seen: how words are written in all texts, which tells a name that begins a sentence from another word there.
    """
    matches = list(WORD.finditer(text))
    if not any(match.group()[0].islower() for match in matches):
        return Capitals(set(), [])
    inside: set[str] = set()
    runs: list[list[str]] = [[]]
    end, before = 0, ""
    for match, after in zip(matches, [*matches[1:], None], strict=True):
        word, begins = match.group(), begins_sentence(text, match.start())
        if not word[0].isupper():
            runs.append([])
            continue
        inside |= set() if begins else {word}
        between = text[end : match.start()]
        is_title = len(before) == 1 or before.lower() in TITLES
        goes_on = between in BETWEEN or (between == ". " and is_title)
        goes_on = goes_on and bool(runs[-1])
        # a sentence's first word that is one of a name, too
        counts = not begins or (
            word not in seen.leading
            and (
                word in seen.inside
                or word.lower() not in seen.small
                or (after is not None and after.group().lower() in seen.small)
            )
        )
        if not goes_on:
            runs.append([])
        if counts or goes_on:
            runs[-1].append(word)
        end, before = match.end(), word
    named = [[word for word in run if len(word) > 1] for run in runs if len(run) > 1]
    return Capitals(inside, [run for run in named if run])


def begins_sentence(text: str, start: int) -> bool:
    """Whether a word may have its capital from the sentence alone."""
    for at in range(start - 1, -1, -1):
        if text[at] in ENDS:
            return True
        if text[at].isalnum() or text[at] == "_":
            return False
    return True
