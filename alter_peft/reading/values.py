# SPDX-License-Identifier: Apache-2.0
"""Cells and values -> text, where there is one way to write them; anything else is said to be unusable."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any


class Unusable(ValueError):
    """What is wrong with a value, and how to mend it: the end of a sentence that begins with where it stands."""


KINDS = {"list": "a list", "dict": "an object", "bytes": "binary"}
EMPTY = "but needs text there. Fill it in, or remove the row"


def as_text(value: Any) -> str:
    """
    A value as text. Numbers and truth values are written as in JSON: 42, 0.5, true.

    Raises:
        Unusable: null or no number; a whole number that is stored as a float, which may have been written 7 or 7.0; a
            list, an object or any other type; half a character (a lone surrogate), which no file can hold.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(
                f"whose character {error.start} is half of one (a lone surrogate). Write the text anew"
            ) from error
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Unusable(EMPTY)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        raise Unusable(f"which may have been written {value:.0f} or {value}. Write it as text")
    if isinstance(value, int | float | Decimal):
        return str(value)
    kind = KINDS.get(type(value).__name__, f"of type {type(value).__name__}")
    raise Unusable(f"which is {kind}, but needs text there. Write it as text, or name another column")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, white space, or characters of no width."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def filled(value: Any) -> str:
    """As `as_text`, of a text that must not be blank."""
    text = as_text(value)
    if is_blank(text):
        raise Unusable(EMPTY)
    return text


def texts(value: Any) -> list[str]:
    """A list of texts that are not blank; one may stand alone, and null or a blank cell is none."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return []
    return [filled(one) for one in (value if isinstance(value, list | tuple) else [value])]


def shown(value: Any) -> str:
    """A value as messages quote it: its first characters."""
    text = repr(value[:80]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 90 else f"{text[:80]}..."
