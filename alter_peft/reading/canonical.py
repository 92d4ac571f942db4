# SPDX-License-Identifier: Apache-2.0
"""A row as it came -> rows under the names that trainers and metrics know, every value checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from datasets import Features, Value

from .chats import answers, turns
from .columns import OTHERS, SUBJECT, TOKENS, Taken
from .json_rows import Twice, written_out
from .values import EMPTY, Unusable, as_text, filled, is_blank, texts


T = TypeVar("T")
Row = dict[str, Any]
TEXT, TURNS = Value("string"), [{"role": Value("string"), "content": Value("string")}]
FEATURES: dict[str, Any] = {
    "tokens": {},
    "chats": {"prompt": TURNS, "completion": TURNS},
    "whole chats": {"messages": TURNS},
    "chat pairs": {"prompt": TURNS, "completion": TURNS},
    "choices": {"prompt": TEXT, "completion": TEXT, "wrong": [TEXT]},
    "pairs": {"prompt": TEXT, "completion": TEXT},
    "prompts": {"prompt": TEXT},
    "text": {"text": TEXT},
}
AS_PAIRS = (
    """Write them as ["one", "two"], or take answers as they are by `--columns prompt=question completion=answer`"""
)
MASK = re.compile(r"<extra_id_\d+>")  # what T5 leaves in the place of what is to be filled in


class BadCell(ValueError):
    """A value that cannot be read: of which column, and why."""

    def __init__(self, column: str, value: Any, problem: str) -> None:
        super().__init__(problem)
        self.column, self.value, self.problem = column, value, problem


def features(taken: Taken, with_domain: bool) -> Features:
    """The columns of what `canonical` gives, and their types."""
    own = dict(FEATURES[taken.kind])
    own |= {name: [Value("int64")] for name in TOKENS if name in taken.columns}
    own |= {name: [TEXT] if name == "wrong" else TEXT for name in OTHERS if name in taken.columns}
    own |= {SUBJECT: [TEXT]} if SUBJECT in taken.columns else {}
    return Features({**own, **({"domain": TEXT} if with_domain else {})})


def canonical(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    """
    The row, or of a chat a row for each answer.

    Raises:
        BadCell: a value that is none of what its column must hold.
    """
    found = KINDS[taken.kind](row, taken)
    extra: Row = {}
    for name in OTHERS:
        if column := taken.columns.get(name):
            extra[name] = cell(row, column, texts if name == "wrong" else _optional)
    if column := taken.columns.get("domain") or taken.maybe_domain:
        extra["domain"] = cell(row, column, _optional)
    if column := taken.columns.get(SUBJECT):
        extra[SUBJECT] = cell(row, column, texts)
    return [{**one, **extra} for one in found]


def cell(row: Mapping[str, Any], column: str, check: Callable[[Any], T]) -> T:
    """What a check makes of a row's value in a column."""
    value = row.get(column)
    try:
        return check(value)
    except Unusable as error:
        raise BadCell(column, value, str(error)) from error


def _optional(value: Any) -> str | None:
    """A text, or none if the cell is blank."""
    if value is None or (isinstance(value, str) and is_blank(value)):
        return None
    return as_text(value)


def _pairs(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    prompt = _prompts(row, taken)[0]["prompt"]
    return [{"prompt": prompt, "completion": cell(row, taken.columns["completion"], filled)}]


def _prompts(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    """The prompt, which may be blank: then the text has none."""
    parts = [cell(row, taken.columns["prompt"], as_text)]
    parts += [part for column in taken.beside if (part := cell(row, column, _optional))]
    return [{"prompt": "\n\n".join(parts)}]


def _texts(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    text = cell(row, taken.columns["text"], filled)
    if column := taken.columns.get("masked"):
        pieces = [piece.strip() for piece in MASK.split(cell(row, column, _optional) or "")]
        fill = [piece for piece in pieces if piece]
        if fill and len(fill) == len(MASK.findall(text)):
            left = iter(fill)
            text = MASK.sub(lambda _: next(left), text)
    return [{"text": text}]


def _chats(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    found = cell(row, taken.columns["messages"], lambda chat: answers(turns(chat)))
    return [{"prompt": before, "completion": answer} for before, answer in found]


def _whole_chats(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    return [{"messages": cell(row, taken.columns["messages"], turns)}]


def _chat_pairs(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    prompt = cell(row, taken.columns["prompt"], turns)
    completion = cell(row, taken.columns["completion"], turns)
    if is_blank(completion[-1]["content"]):
        raise BadCell(taken.columns["completion"], row[taken.columns["completion"]], EMPTY)
    return [{"prompt": prompt, "completion": completion}]


def _choices(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    """Multiple choice: the right one is the answer. Its label, a letter, its place from 0 or its text names it."""
    if "choices" in taken.columns:
        labels, choices = cell(row, taken.columns["choices"], _labelled)
    else:
        columns = {label: column for label, column in taken.columns.items() if len(label) == 1}
        labels = [label for label, column in columns.items() if not is_blank(str(row.get(column) or ""))]
        choices = [cell(row, columns[label], filled) for label in labels]

    def right(value: Any) -> int:
        named = as_text(value).strip()
        if isinstance(value, str) and named in choices:
            return choices.index(named)
        label = named.strip("().: ").upper()
        if label in labels:
            return labels.index(label)
        place = int(named) if named.isdecimal() else None
        if place is None or not 0 <= place < len(choices):
            raise Unusable(
                f"which is none of its {len(choices)} choices. Give the right one's place from 0, or its letter"
            )
        return place

    place = cell(row, taken.columns["answer"], right)
    wrong = [choice for number, choice in enumerate(choices) if number != place]
    return [{"prompt": cell(row, taken.columns["question"], filled), "completion": choices[place], "wrong": wrong}]


def _labelled(value: Any) -> tuple[list[str], list[str]]:
    """The labels of choices and their texts: of a list, of ARC's two lists, of label -> text, or of any as JSON."""
    if isinstance(value, str):
        value = _written_out(value)
    if isinstance(value, dict) and {"text", "label"} <= value.keys():  # ARC
        if not all(isinstance(value[name], list | tuple) for name in ("text", "label")):
            raise Unusable(f"whose 'text' and 'label' must be two lists. {AS_PAIRS}")
        named = [as_text(label).strip().upper() for label in value["label"]]
        found = texts(value["text"])
    elif isinstance(value, dict):  # MedQA; of several rows in one table, labels that a row lacks are null
        there = {label: text for label, text in value.items() if text is not None}
        named, found = [as_text(label).strip().upper() for label in there], texts(list(there.values()))
    else:
        found = texts(value)
        named = [chr(ord("A") + number) for number in range(len(found))]
    if len(found) < 2 or len(named) != len(found):
        raise Unusable(f"but needs two choices or more, each with its text. {AS_PAIRS}")
    return named, found


def _written_out(text: str) -> Any:
    """As `written_out`, of choices."""
    try:
        value = written_out(text)
    except Twice as error:
        raise Unusable(f"which has {error}") from error
    if value is None:
        raise Unusable(f"which is no list of choices. {AS_PAIRS}")
    return value


def _tokens(row: Mapping[str, Any], taken: Taken) -> list[Row]:
    return [{name: cell(row, taken.columns[name], _ids) for name in TOKENS if name in taken.columns}]


def _ids(value: Any) -> list[int]:
    if not value or not isinstance(value, list) or not all(type(one) is int for one in value):
        raise Unusable("but must be a list of whole numbers, as a tokenizer makes it. Mend it, or remove the row")
    return value


KINDS: dict[str, Callable[[Mapping[str, Any], Taken], list[Row]]] = {
    "tokens": _tokens,
    "chats": _chats,
    "whole chats": _whole_chats,
    "chat pairs": _chat_pairs,
    "choices": _choices,
    "pairs": _pairs,
    "prompts": _prompts,
    "text": _texts,
}
