# SPDX-License-Identifier: Apache-2.0
"""The texts of a row, whatever its format: read, or changed in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .reading.chats import SAID, said, system_turns


COLUMNS = ("prompt", "completion", "messages", "conversations")  # beside that of plain text


def row_text(row: Mapping[str, Any], text_field: str = "text") -> str:
    """All text of a row, one after the other."""
    return " ".join(said(row[column]) for column in (*COLUMNS, text_field) if column in row)


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
    columns = [column for column in (*COLUMNS, text_field) if row.get(column) is not None]
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
