# SPDX-License-Identifier: Apache-2.0
"""Documents -> passages, cut where a reader would pause."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .values import is_blank


PASSAGE = 2000  # characters at most, some 500 tokens of English
# Ends of a paragraph, of a sentence and of a word, in the order in which they are preferred
BORDERS = [
    re.compile(r"\n[ \t\r]*\n\s*"),
    re.compile(r"[.!?…][\"'»”’)\]]*\s+|[。！？][」』”’）]*\s*"),  # noqa: RUF001 (ends of Chinese and Japanese sentences)
    re.compile(r"\s+"),
]


def passages(text: str, size: int = PASSAGE) -> Iterator[str]:
    """
    A text in passages of at most `size` characters, in order; nothing is lost but white space where it was cut.

    Each ends with the last paragraph that ends in the second half of what fits, or else with the last sentence, or
    else with the last word.
    """
    start = 0
    while len(text) - start > size:
        end = _border(text[start : start + size])
        yield from _visible(text[start : start + end])
        start += end
    yield from _visible(text[start:])


def _border(window: str) -> int:
    for border in BORDERS:
        ends = [match.end() for match in border.finditer(window, len(window) // 2)]
        if ends:
            return ends[-1]
    return len(window)


def _visible(text: str) -> Iterator[str]:
    if not is_blank(text):
        yield text.strip()
