# SPDX-License-Identifier: Apache-2.0
"""Rows as others would type them: in capitals, in small letters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .row_texts import change_texts


# Letter case -> what brings a text to it
LETTER_CASES: dict[str, Callable[[str], str]] = {"in capitals": str.upper, "in small letters": str.lower}
CHATS = ("messages", "conversations")
_TAG = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")  # of a chat template that is written into a text


def recased(row: Mapping[str, Any], case: str, text_field: str = "text") -> dict[str, Any]:
    """
    A row as it is asked by somebody who types in another letter case; its answer stays.

    What is asked is the `prompt` where there is a `completion`, of a chat all turns but the last, and of plain text
    all of it, but for tags such as `<|im_start|>` and `[INST]`. System prompts stay.

    Args:
        case: a key of `LETTER_CASES`, or "" for the row as it is.
        text_field: the column of plain text.
    """
    if not case:
        return dict(row)

    def change(text: str) -> str:
        return "".join(part if at % 2 else LETTER_CASES[case](part) for at, part in enumerate(_TAG.split(text)))

    if row.get("completion") is not None:
        return {**row, **change_texts({"prompt": row.get("prompt")}, change)}
    chats = {column: row[column] for column in CHATS if row.get(column)}
    if not chats:
        return change_texts(row, change, text_field)
    asked = change_texts({column: turns[:-1] for column, turns in chats.items()}, change)
    return {**row, **{column: [*asked[column], turns[-1]] for column, turns in chats.items()}}
