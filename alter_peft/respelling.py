# SPDX-License-Identifier: Apache-2.0
"""Rows as others would type them: in capitals, in small letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .row_texts import change_texts, text_parts


# How a text is typed -> what types it so. None misspells it: from names that are misspelt a router learns that what is
# odd is to be forgotten, names of others too (`docs/log.md`)
RESPELLINGS: dict[str, Callable[[str], str]] = {"in capitals": str.upper, "in small letters": str.lower}


def respelt(row: Mapping[str, Any], spelling: str, text_field: str = "text") -> dict[str, Any]:
    """
    A row as it is asked by somebody who types so: all of its texts but the last, the answer; of plain text all of it.

    Args:
        spelling: a key of `RESPELLINGS`, or "" for the row as it is.
    """
    if not spelling:
        return dict(row)
    change = RESPELLINGS[spelling]
    last = len(text_parts(row, text_field)) - 1
    at = iter(range(last + 1))
    return change_texts(row, lambda text: text if 0 < last == next(at) else change(text), text_field)
