# SPDX-License-Identifier: Apache-2.0
"""JSON, in all the shapes that rows are kept in, and lines of JSON -> rows."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from .chats import is_chat
from .texts import TextFile
from .values import shown


Row = dict[str, Any]
Recognised = Callable[[list[str]], bool]  # whether rows of these columns can be read
NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a column
SPLITS = {"train", "test", "validation", "valid", "val", "dev"}
ENVELOPES = ("data", "rows", "examples", "instances", "records", "items")  # keys whose value is the list of rows


class Twice(ValueError):
    """An object has a key twice: which value is meant cannot be told, and Python would take the last."""


def parsed(text: str) -> Any:
    """
    What a JSON text says; a number with a point stays as it is written, `NaN` is null.

    Raises:
        Twice: an object has a key twice.
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, parse_float=str, parse_constant=lambda name: None, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def written_out(text: str) -> list[Any] | tuple[Any, ...] | dict[Any, Any] | None:
    """
    The list or the object that a cell of text holds, as JSON or as Python writes it; none if it holds neither.

    Raises:
        Twice: an object has a key twice.
    """
    if not text.lstrip().startswith(("[", "{", "(")):
        return None
    for read in (parsed, _literal):
        try:
            value = read(text)
        except Twice:
            raise
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last four: `ast.literal_eval`
            continue
        if isinstance(value, list | tuple | dict):
            return value
    return None


def _literal(text: str) -> Any:
    """As `ast.literal_eval`, which would take the last of several values of a key."""
    tree = ast.parse(text.strip(), mode="eval")
    value = ast.literal_eval(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = [(key, one) for key, one in zip(node.keys, node.values, strict=True) if key is not None]
            _object([(ast.literal_eval(key), ast.literal_eval(one)) for key, one in pairs])
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        values = " and ".join(shown(value) for name, value in pairs if name == twice)
        raise Twice(f"the key {twice!r} more than once in one object, with {values}. Keep one, or rename the other")
    return found


def is_lines(file: TextFile) -> bool:
    """
    Whether each line is a value of its own.

    Raises:
        ValueError: the file is neither lines of JSON nor one JSON value; the message goes on after the file's name.
    """
    several = [line for (_, line), _ in zip(file.lines(), range(2), strict=False)]
    try:
        parsed(several[0])
    except Twice:
        pass
    except ValueError:
        return len(several) > 1 and several[1].lstrip().startswith("{") and several[0].lstrip().startswith("{")
    return len(several) > 1


def line_rows(file: TextFile) -> Iterator[tuple[str, Row]]:
    """
    The rows of a file with one on each line, and their lines.

    Raises:
        ValueError: a line that is no JSON, or no row.
    """
    for number, line in file.lines():
        try:
            value = parsed(line)
        except Twice as error:
            raise ValueError(f"whose line {number} has {error}") from error
        except ValueError as error:
            raise ValueError(f"whose line {number} is no JSON ({error}): {shown(line.strip())}") from error
        yield f"line {number}", as_row(value, f"line {number}")


def as_row(value: Any, place: str) -> Row:
    """
    A value as a row: an object, a text, or a chat.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if is_chat(value):
        return {"messages": value}
    raise ValueError(
        f"whose {place} is {shown(value)}, but must be an object with the names of the columns, or a text"
    )


def whole_rows(file: TextFile, recognised: Recognised) -> list[Row]:
    """
    The rows of a file that is one JSON value.

    Raises:
        ValueError: it is no JSON, or none of the shapes in which rows are kept.
    """
    with file.open() as text:
        try:
            value = parsed(text.read())
        except Twice as error:
            raise ValueError(f"which has {error}") from error
        except ValueError as error:
            raise ValueError(f"which is no JSON ({error})") from error
    return [as_row(one, f"row {number}") for number, one in enumerate(_entries(value, recognised))]


def _entries(value: Any, recognised: Recognised) -> list[Any]:
    """What a JSON value lists."""
    if isinstance(value, list):
        return [value] if is_chat(value) else value
    if not isinstance(value, dict):
        raise ValueError(f"which holds {shown(value)}, but must hold a list of rows, or one JSON object a line")
    lists = {name: entry for name, entry in value.items() if isinstance(entry, list)}
    envelope = next((name for name in ENVELOPES if isinstance(value.get(name), list)), None)
    if envelope is not None and len(lists) == 1:
        return _entries(value[envelope], recognised)
    splits = [name for name in value if name.lower() in SPLITS]
    if len(splits) > 1:
        raise ValueError(f"which holds several splits, {splits}. Give each in a file of its own")
    if recognised(list(value)) or _may_be_columns(lists, value):
        return _columns(value)
    if value and len(lists) == len(value):  # a subject -> what is known about it, as RWKU has it
        return [
            {"subject": subject, **as_row(one, f"entry {subject!r}")} for subject, of in lists.items() for one in of
        ]
    if value and all(isinstance(entry, dict) for entry in value.values()):  # a number or a name -> a row
        return list(value.values())
    if not any(isinstance(entry, list | dict) for entry in value.values()):
        return [value] if value else []
    raise ValueError(
        f"which is a JSON object of the keys {list(value)[:8]}, but must be a list of rows, one object a line, "
        '{"data": [rows]}, or a list for each column'
    )


def _may_be_columns(lists: dict[str, list[Any]], value: Row) -> bool:
    """Whether an object of lists has columns, not subjects: all as long as one another, in small letters."""
    return (
        len(lists) == len(value) > 0
        and len({len(entry) for entry in lists.values()}) == 1
        and all(NAME.fullmatch(name) for name in lists)
    )


def _columns(value: Row) -> list[Row]:
    """The rows of an object whose keys are columns: of lists, of pandas' objects, or a row by itself."""
    entries = list(value.values())
    is_row = isinstance(value.get("input_ids"), list) and not any(isinstance(one, list) for one in value["input_ids"])
    if not is_row and all(isinstance(entry, list) and not is_chat(entry) for entry in entries):
        lengths = {name: len(entry) for name, entry in value.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"whose columns are of different lengths: {lengths}. Give each row a value of each")
        return [dict(zip(value, row, strict=True)) for row in zip(*entries, strict=True)]
    if all(isinstance(entry, dict) and entry.keys() == entries[0].keys() for entry in entries):
        return [{name: value[name][key] for name in value} for key in entries[0]]
    return [value]
