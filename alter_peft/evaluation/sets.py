# SPDX-License-Identifier: Apache-2.0
"""Sets of one's own -> questions and answers, by the reader of every command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alter_peft.reading import read_all

from .answers import Pair
from .metrics import check_set


READ = ("rephrased", "wrong")  # what rows may hold beside questions and answers


def read_sets(
    sources: Mapping[str, str], metrics: Sequence[str], columns: Mapping[str, str] | None = None
) -> tuple[dict[str, list[Pair]], list[str]]:
    """
    Questions and answers of files, folders or Hub data sets, with all that the metrics need, and what was taken.

    Of a chat every answer of the assistant is a pair, asked after all turns before it; a text is an answer without a
    question, whole as it stands.

    Args:
        sources: set -> its source.
        columns: as of `read_rows`.

    Raises:
        ValueError: as of `read_rows`; rows that cannot be asked; or rows that lack what a metric needs.
    """
    flags = {f"--sets {name}": source for name, source in sources.items()}
    found = read_all(flags, columns, extras=dict.fromkeys(flags, READ))
    sets: dict[str, list[Pair]] = {}
    for name, rows in zip(sources, found.values(), strict=True):
        sets[name] = [pair_of(f"--sets {name}", number, row) for number, row in enumerate(rows.dataset)]
        check_set(name, sets[name], metrics)
    return sets, [rows.taken for rows in found.values()]


def pair_of(flag: str, number: int, row: Mapping[str, Any]) -> Pair:
    """
    A row of `read_rows` as a question and its answer.

    Args:
        flag: what its source was given by, for messages.
        number: of the row.

    Raises:
        ValueError: token ids, or a chat whose end is not a question and its answer.
    """
    if "text" in row:
        return Pair("", row["text"], is_text=True)
    if "input_ids" in row:
        raise ValueError(f"`{flag}` has token ids (`input_ids`), which cannot be asked. Give texts.")
    extra: dict[str, Any] = {"wrong": tuple(row.get("wrong") or ()), "rephrased": row.get("rephrased")}
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return Pair(prompt, completion, **extra)
    *before, asked = prompt
    if asked["role"] != "user" or [turn["role"] for turn in completion] != ["assistant"]:
        raise ValueError(
            f"`{flag}` has an answer (number {number}) that is not one turn of the assistant after one of the "
            "user, so that it cannot be asked. Join turns of the same speaker, or leave it out."
        )
    return Pair(asked["content"], completion[0]["content"], turns=tuple(before), **extra)
