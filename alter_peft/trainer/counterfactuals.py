# SPDX-License-Identifier: Apache-2.0
"""Rows that a router is fitted on beside those that are given: about other subjects, and behind other text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from alter_peft.retain_rows import retain_auto
from alter_peft.subjects import WITH_FACTS, Renaming, change_texts, find_subjects, text_parts
from alter_peft.tuner.router_fit import COUNTERFACTUAL, GENERAL, RETAIN


logger = logging.getLogger(__name__)  # not accelerate's, which needs a process state
MOST_TOKENS = 60_000  # of all copies, about, whatever the number of rows to forget
BEHIND = 2  # times that a row, and as many copies of one to forget, stand behind other text
LONGEST_BEHIND = 8  # general questions and answers before it, at most: about 200 tokens


class RouterText(NamedTuple):
    """
    What a router is fitted on beside the rows that are given.

    ids: token ids, (T,).
    expert: that its tokens are to go to, or a key of `SHARES`.
    start: the first position that counts.
    """

    ids: list[int]
    expert: int
    start: int = 0


class RouterTexts(NamedTuple):
    """
    beside: texts beside the rows that are given.
    starts: of each row to forget, the first position that counts: before its subject is named it may be about anyone.
    """

    beside: list[RouterText]
    starts: list[int]


class _Made(NamedTuple):
    """A row made of another one (its place): with what is put before it, and the expert that it is to go to."""

    row: dict[str, Any]
    expert: int
    of: int = -1
    before: str = ""


def router_texts(
    forget: Dataset,
    retain: Dataset,
    given: Sequence[Any] | None,
    copies: int,
    encode: Callable[[dict[str, Any]], list[int]],
    text_field: str,
    seed: int,
) -> RouterTexts:
    """
    Copies of the rows to forget with their subjects renamed, general text, and rows of each kind behind general text.

    By the copies a router learns to tell subject from subject, and by what stands behind other text that a subject
    may come late. It never learns to tell rows of one subject apart: whoever could ask which of them were forgotten
    would have the list (`docs/paper.md`).

    Args:
        forget: texts, and the column `expert`.
        retain: texts.
        given: the names of the subject of each row to forget, where the user says them.
        copies: of each row to forget.
        encode: a row's token ids.
        text_field: the column of plain text.
        seed: of the names, of what stands before a row, and of which rows are taken where they are too many.
    """
    if copies == 0 or "input_ids" in forget.column_names:
        return RouterTexts([], [0] * len(forget))
    rows = [dict(row) for row in forget]
    own = [encode(row) for row in rows]
    most = max(1, MOST_TOKENS * len(own) // sum(map(len, own)))
    made = _rows(rows, [dict(row) for row in retain], forget, given, copies, most, text_field, seed)
    starts, beside = [0] * len(rows), []
    for one in made:
        plain = encode(one.row)
        start = _common(plain, own[one.of]) if one.expert == COUNTERFACTUAL else 0
        if one.expert == COUNTERFACTUAL:
            starts[one.of] = start if starts[one.of] == 0 else min(start, starts[one.of])
        elif one.expert > 0:
            start = starts[one.of]
        ids = encode(_behind(one.row, one.before, text_field)) if one.before else plain
        beside.append(RouterText(ids, one.expert, max(0, len(ids) - len(plain) + start)))
    return RouterTexts(beside, starts)


def _rows(
    rows: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    forget: Dataset,
    given: Sequence[Any] | None,
    copies: int,
    most: int,
    text_field: str,
    seed: int,
) -> list[_Made]:
    """The rows that are made of those to forget, `rows`, and those to retain, `kept`: `most` of each kind."""
    generator = np.random.default_rng(seed)
    general = [dict(row) for row in retain_auto(forget, text_field=text_field)]
    others = [text for row in (*kept, *general) for text in text_parts(row, text_field)]
    subjects = find_subjects([text_parts(row, text_field) for row in rows], others, given)
    places = [place for place, subject in enumerate(subjects) if subject.words]
    if not places:
        logger.debug("No subject was found in `train_dataset`: the router sees no copies of its rows about others.")
    renaming = Renaming(others, {word for subject in subjects for word in (*subject.words, *subject.facts)})

    def renamed(place: int, before: str = "") -> _Made:
        change = renaming.rename(subjects[place], bool(generator.random() < WITH_FACTS), generator)
        return _Made(change_texts(rows[place], change, text_field), COUNTERFACTUAL, place, before)

    def some(of: Sequence[int], number: int) -> list[int]:
        return list(of) if len(of) <= number else sorted(generator.permutation(of)[:number].tolist())

    def idle() -> str:
        count = int(generator.integers(1, LONGEST_BEHIND + 1))
        picked = [general[int(at)] for at in generator.integers(0, len(general), count)]
        return " ".join(text for row in picked for text in text_parts(row, text_field)) + "\n\n"

    made = [renamed(place) for _ in range(copies) for place in some(places, max(1, most // copies))]
    made += [_Made(row, GENERAL) for row in general]
    if general:
        front = some(range(len(rows)), most // BEHIND) * BEHIND
        made += [_Made(rows[place], int(rows[place]["expert"]), place, idle()) for place in front]
        made += [renamed(place, idle()) for place in some(places, most // BEHIND) * BEHIND]
        told = [place for place, row in enumerate(kept) if text_parts(row, text_field)]
        made += [_Made(kept[place], RETAIN, -1, idle()) for place in some(told, most // BEHIND) * BEHIND]
    return made


def _behind(row: dict[str, Any], before: str, text_field: str) -> dict[str, Any]:
    first = iter([before])  # the question's, or of a chat its first turn's
    return change_texts(row, lambda text: next(first, "") + text, text_field)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with in common."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
