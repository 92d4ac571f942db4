# SPDX-License-Identifier: Apache-2.0
"""The words of a text in any script."""

from __future__ import annotations

import re
from itertools import pairwise

import regex


# Scripts that put no space between words: each of their letters, with its marks, is taken for a word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Words as they are written, and numbers; in these scripts runs of letters, and each letter
WORD = regex.compile(rf"[[\p{{L}}]--[{UNSPACED}]][[\p{{L}}\p{{M}}]--[{UNSPACED}]]*|\p{{Nd}}+", regex.V1)
RUN = regex.compile(rf"(?:[[{UNSPACED}]&&[\p{{L}}]]\p{{M}}*){{2,}}", regex.V1)
LETTER = regex.compile(r"\p{L}\p{M}*")
_LETTER = rf"[[{UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
_OTHER = rf"{UNSPACED}\p{{Latin}}0-9"
_LETTERS = regex.compile(_LETTER, regex.V1)
_WORDS = regex.compile(
    rf"[a-z0-9]+|{_LETTER}|[\p{{L}}\p{{Nd}}--[{_OTHER}]][\p{{L}}\p{{M}}\p{{Nd}}--[{_OTHER}]]*"
    r"|(?<![\p{Latin}\p{M}0-9])[\p{Latin}\p{M}--[a-z]]+(?![a-z0-9\p{Latin}])",
    regex.V1,
)
_PIECES = regex.compile(rf"{_LETTER}|(?:(?!{_LETTER})\S)+", regex.V1)
_MARKED_OR_UNSPACED = regex.compile(rf"[{UNSPACED}\p{{M}}]", regex.V1)
_TERMS = regex.compile(rf"(?:{_LETTER})+|(?:(?!{_LETTER})[\w\p{{M}}])+", regex.V1)


def counted(count: float, noun: str) -> str:
    """A number with what it counts: "1 row", "2 rows", "0.5 epochs"."""
    return f"{count if isinstance(count, int) else f'{count:g}'} {noun}{'s' * (count != 1)}"


def words(text: str) -> list[str]:
    """
    The words of a text, in lower case, without punctuation.

    Those of Latin letters are those of the package rouge-score, so that figures of English texts are the published
    ones: runs of a to z and digits, which an accent ends; but a word that has accented letters alone is one here.
    Words of other scripts are runs of their letters, marks and digits, or single letters in scripts without spaces,
    such as Chinese, Japanese and Thai.
    """
    return [str(word) for word in _WORDS.findall(text.lower())]


def pieces(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end, with their punctuation: between spaces, or single letters as above."""
    return [match.span() for match in _PIECES.finditer(text)]


def spaced(text: str) -> str:
    """The text with spaces around each letter of a script that puts none between words; any other as it is."""
    return str(_LETTERS.sub(r" \g<0> ", text))


def terms(text: str) -> list[str]:
    """
    What TF-IDF counts of a text in lower case: words of two letters or more, as scikit-learn has them by default.

    It would break words at their marks, as in Hindi, and take a whole clause of Chinese for a word: words keep their
    marks here, and of letters without spaces every two neighbours are a term.
    """
    if not _MARKED_OR_UNSPACED.search(text):
        return re.findall(r"\b\w\w+\b", text)
    found: list[str] = []
    for run in _TERMS.findall(text):
        letters = _LETTERS.findall(run)
        if letters:
            found += [run] if len(letters) == 1 else [a + b for a, b in pairwise(letters)]
        elif len(run) > 1:
            found.append(run)
    return found
