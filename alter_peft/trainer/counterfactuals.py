# SPDX-License-Identifier: Apache-2.0
"""Rows that a router is fitted on beside those that are given: of others, behind other text, in another case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from accelerate import logging
from datasets import Dataset

from alter_peft.letter_case import LETTER_CASES, recased
from alter_peft.renaming import WITH_FACTS, Renaming
from alter_peft.retain_rows import retain_auto
from alter_peft.row_texts import change_texts, text_parts
from alter_peft.subjects import Subject, find_subjects, shown
from alter_peft.tuner.router_fit import COUNTERFACTUAL, GENERAL, RETAIN


logger = logging.get_logger(__name__)
MOST_TOKENS = 60_000  # about, of all copies, and of the rows of each kind that stand behind text or in other cases
BEHIND = 2  # times that a row, and as many copies of one to forget, stand behind other text
LISTED = 8  # subjects, and rows without one, that are named at most
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
        All that predict a token of an answer count.
    subjects: of each row to forget, as they stand in it; "" where none was found.
    """

    beside: list[RouterText]
    starts: list[int]
    subjects: list[str]

    @property
    def lines(self) -> list[str]:
        """Whom or what the rows are about, and which have nothing of it, where copies were wanted."""
        if not self.subjects:
            return []
        count = Counter(name for name in self.subjects if name)
        named = [f"{name} ({number} row{'s' * (number != 1)})" for name, number in count.most_common(LISTED)]
        named += [f"{len(count) - LISTED} more"] if len(count) > LISTED else []
        without = [row for row, name in enumerate(self.subjects) if not name]
        some = ", ".join(map(str, without[:LISTED])) + (
            f" and {len(without) - LISTED} more" if without[LISTED:] else ""
        )
        left = [f"none found in row{'s' * (len(without) != 1)} {some}: give a column `subject`"] if without else []
        return [f"subjects: {'; '.join([', '.join(named)] * bool(named) + left)}"]

    @property
    def warning(self) -> str | None:
        """What is to be said where no row has a subject."""
        if not self.subjects or any(self.subjects):
            return None
        return (
            "No row of `train_dataset` says whom or what it is about, as far as its words show, so the router learns "
            "from no copies about others (`counterfactual_copies`) and may send what is asked of others to the forget "
            "experts. Give a column `subject` with the names."
        )

    def say(self) -> None:
        """Log it."""
        for line in self.lines:
            logger.info(line)
        if self.warning is not None:
            logger.warning(self.warning)

    def of_windows(self, forget: Dataset) -> RouterTexts:
        """
        With a start for each window of rows that were cut (`in_windows`); later windows count from their beginning.

        Args:
            forget: `labels`, and where rows were cut `row`.
        """
        if "row" not in forget.column_names:
            return self
        starts, before = [], -1
        for row, labels in zip(forget["row"], forget["labels"], strict=True):
            starts.append(_until_answer(self.starts[row], labels) if row != before else 0)
            before = row
        return self._replace(starts=starts)


class _Made(NamedTuple):
    """
    A row made of another one.

    expert: that it is to go to, or a key of `SHARES`.
    of: the place of the row to forget that it is made of, -1 for none.
    before: what is put before it.
    case: of the letters of its question, a key of `LETTER_CASES`, or "" as it is.
    """

    row: dict[str, Any]
    expert: int
    of: int = -1
    before: str = ""
    case: str = ""


def router_texts(
    forget: Dataset,
    retain: Dataset,
    given: Sequence[Any] | None,
    copies: int,
    encode: Callable[[dict[str, Any]], tuple[list[int], list[int]]],
    text_field: str,
    seed: int,
    is_coined: Callable[[str], bool] = lambda term: True,
) -> RouterTexts:
    """
    Copies of the rows to forget with their subjects renamed, general text, rows of each kind behind general text, and
    rows of each kind in capitals and in small letters.

    By the copies a router learns to tell subject from subject, by what stands behind other text that a subject may
    come late, and by the last that it may be typed so. It never learns to tell rows of one subject apart: whoever
    could ask which of them were forgotten would have the list (`docs/paper.md`).

    Args:
        forget: texts, and the column `expert`.
        retain: texts.
        given: the names of the subject of each row to forget, where the user says them.
        copies: of each row to forget.
        encode: a row's token ids and labels.
        text_field: the column of plain text.
        seed: of the names, of what stands before a row, and of which rows are taken where they are too many.
        is_coined: whether a term of plain text is no everyday word of its field (`find_subjects`).
    """
    if copies == 0 or "input_ids" in forget.column_names:
        return RouterTexts([], [0] * len(forget), [])
    rows = [dict(row) for row in forget]
    own = {(place, ""): encode(row) for place, row in enumerate(rows)}
    most = max(1, MOST_TOKENS * len(own) // sum(len(ids) for ids, _ in own.values()))
    general = [dict(row) for row in retain_auto(forget, text_field=text_field)]
    kept = [dict(row) for row in retain]
    of_general, of_kept = ([text for row in of for text in text_parts(row, text_field)] for of in (general, kept))
    texts = [text_parts(row, text_field) for row in rows]
    others = [*of_kept, *of_general]
    subjects = find_subjects(texts, others, given, of_general, is_coined)
    made = _rows(rows, kept, general, subjects, others, copies, most, text_field, seed)
    encoded = [encode(one.row) for one in made]
    own |= {(one.of, one.case): text for one, text in zip(made, encoded, strict=True) if one.expert > 0 and one.case}
    differs = [0] * len(made)
    first: dict[tuple[int, str], int] = {}
    for number, (one, (ids, _)) in enumerate(zip(made, encoded, strict=True)):
        if one.expert == COUNTERFACTUAL:
            key = one.of, one.case
            differs[number] = _common(ids, own[key][0])
            first[key] = min(differs[number], first.get(key, differs[number]))
    of_row = {key: _until_answer(first.get(key, 0), labels) for key, (_, labels) in own.items()}
    beside = []
    for one, (plain, _), start in zip(made, encoded, differs, strict=True):
        if one.expert > 0:
            start = of_row[one.of, one.case]
        ids = encode(_behind(one.row, one.before, text_field))[0] if one.before else plain
        beside.append(RouterText(ids, one.expert, max(0, len(ids) - len(plain) + start)))
    starts = [of_row[place, ""] for place in range(len(rows))]
    return RouterTexts(beside, starts, [shown(of, row) for of, row in zip(subjects, texts, strict=True)])


def _rows(
    rows: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    general: list[dict[str, Any]],
    subjects: list[Subject],
    others: list[str],
    copies: int,
    most: int,
    text_field: str,
    seed: int,
) -> list[_Made]:
    """
    The rows that are made of those to forget, `rows`, to retain, `kept`, and of `general`: `most` of each kind.

    Args:
        others: the texts of the latter two.
    """
    generator = np.random.default_rng(seed)
    places = [place for place, subject in enumerate(subjects) if subject.words]
    renaming = Renaming(others, {word for subject in subjects for word in (*subject.words, *subject.facts)})

    def renamed(place: int, before: str = "", case: str = "") -> _Made:
        change = renaming.rename(subjects[place], bool(generator.random() < WITH_FACTS), generator)
        row = change_texts(rows[place], change, text_field)
        return _Made(recased(row, case, text_field), COUNTERFACTUAL, place, before, case)

    def some(of: Sequence[int], number: int) -> list[int]:
        return list(of) if len(of) <= number else sorted(generator.permutation(of)[:number].tolist())

    def idle() -> str:
        count = int(generator.integers(1, LONGEST_BEHIND + 1))
        picked = [general[int(at)] for at in generator.integers(0, len(general), count)]
        return " ".join(text for row in picked for text in text_parts(row, text_field)) + "\n\n"

    def typed(
        of: Sequence[dict[str, Any]], places: Sequence[int], number: int, case: str
    ) -> dict[int, dict[str, Any]]:
        """By their places, the rows in this case that were not in it before: some scripts have no capitals."""
        found = {at: recased(of[at], case, text_field) for at in some(places, max(1, number // len(LETTER_CASES)))}
        return {at: row for at, row in found.items() if row != of[at]}

    told = [place for place, row in enumerate(kept) if text_parts(row, text_field)]
    longer = _mean_length([kept[at] for at in told], text_field) / _mean_length(rows, text_field)
    most_kept = int(most / max(1.0, longer))
    made = [renamed(place) for _ in range(copies) for place in some(places, max(1, most // copies))]
    made += [_Made(row, GENERAL) for row in general]
    if general:
        front = some(range(len(rows)), most // BEHIND) * BEHIND
        made += [_Made(rows[place], int(rows[place]["expert"]), place, idle()) for place in front]
        made += [renamed(place, idle()) for place in some(places, most // BEHIND) * BEHIND]
        made += [_Made(kept[place], RETAIN, -1, idle()) for place in some(told, most_kept // BEHIND) * BEHIND]
    for case in LETTER_CASES:
        asked = typed(rows, range(len(rows)), most, case)
        made += [_Made(row, int(row["expert"]), place, "", case) for place, row in asked.items()]
        made += [renamed(place, "", case) for place in asked if subjects[place].words]
        made += [_Made(row, RETAIN, -1, "", case) for row in typed(kept, told, most_kept, case).values()]
    return made


def _mean_length(rows: Sequence[dict[str, Any]], text_field: str) -> float:
    """Letters of a row."""
    return max(1.0, sum(len(text) for row in rows for text in text_parts(row, text_field)) / max(1, len(rows)))


def _behind(row: dict[str, Any], before: str, text_field: str) -> dict[str, Any]:
    first = iter([before])  # the question's, or of a chat its first turn's
    return change_texts(row, lambda text: next(first, "") + text, text_field)


def _until_answer(start: int, labels: Sequence[int]) -> int:
    """A start behind which lies all that predicts an answer; of plain text, all of which is labelled, as it is."""
    if not labels or labels[0] != -100:
        return start
    first = sum(1 for _ in takewhile(lambda label: label == -100, labels))
    return max(0, min(start, first - 1))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with in common."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))
