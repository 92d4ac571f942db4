# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions from a local file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from string import ascii_uppercase
from typing import Any


SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
COLUMNS = ("question", "choices", "answer")


def read_questions(path: Path | str) -> list[dict[str, Any]]:
    """
    The rows of a local file, `answer` being the place of the right choice.

    Raises:
        ValueError: there is no such file, it holds no rows, or one lacks a column or has an answer out of range.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file of questions at {str(path)!r}. Give the path of one of {list(SUFFIXES)}.")
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        text = file.read()
    try:
        lines = ".jsonl" in Path(path).suffixes
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}).") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{str(path)!r} has no rows. Give a list of at least one question.")
    return [_checked(row, f"Row {number} of {str(path)!r}") for number, row in enumerate(rows)]


def _checked(row: Any, place: str) -> dict[str, Any]:
    missing = [column for column in COLUMNS if not isinstance(row, dict) or column not in row]
    if missing:
        raise ValueError(f"{place} has no column {missing[0]!r}. Each row needs {list(COLUMNS)}.")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise ValueError(
            f"{place} has the `choices` {choices!r}, but must have a list of 2 to {len(ascii_uppercase)}."
        )
    if not all(isinstance(text, str) and text for text in (row["question"], *choices)):
        raise ValueError(f"{place} has a `question` or one of `choices` that is no text or empty. Give each a text.")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{place} has the `answer` {answer!r}, but must have the place of one of its {len(choices)} choices, from "
            "0, or its text."
        )
    return {**row, "answer": answer}
