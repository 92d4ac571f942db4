# SPDX-License-Identifier: Apache-2.0
"""Rows longer than what is trained at once: overlapping windows, in exactly one of which each label is a label."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import logging
from datasets import Dataset

from alter_peft.words import counted


logger = logging.get_logger(__name__)
SHARE = 4  # a window has one part in so many of a row's beginning at most, and as much context before new labels
LISTED = 5  # rows that an error names, at most


class Limit(NamedTuple):
    """
    The longest row that is trained as it is.

    tokens: how many it has.
    source: what sets it, as a message says it.
    """

    tokens: int
    source: str


def row_limit(max_length: int | None, positions: int | None, multiple: int | None) -> Limit | None:
    """
    The longest row that is trained as it is, by the user's wish and the model's positions; `None` if any may be.

    Args:
        max_length: as the user wants it.
        positions: of the model, see [`ScoredModel`].
        multiple: what the width of a batch is padded to.

    Raises:
        ValueError: no row would have a token that is predicted.
    """
    if positions is None or (max_length is not None and max_length <= positions):
        limit = None if max_length is None else Limit(max_length, f"`max_length`={max_length}")
    else:
        limit = Limit(positions, f"the model's {positions} positions")
    if (
        limit is not None
        and positions is not None
        and multiple
        and -(-limit.tokens // multiple) * multiple > positions
    ):
        limit = Limit(positions // multiple * multiple, f"{limit.source} (`pad_to_multiple_of`={multiple})")
    if limit is not None and limit.tokens < 2:
        raise ValueError(
            f"A row can have {limit.tokens} tokens by {limit.source}, but must have 2 or more: nothing predicts the "
            "first one."
        )
    return limit


class Window(NamedTuple):
    """Of a row: its first `head` tokens, then those from `start` to `end`, of which those from `first` are labels."""

    head: int
    start: int
    first: int
    end: int

    def cut(self, ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels of the window."""
        kept = [-100] * (self.head + self.first - self.start) + [*labels[self.first : self.end]]
        return [*ids[: self.head], *ids[self.start : self.end]], kept


def windows(labels: Sequence[int], limit: int, starts_with_bos: bool = False) -> list[Window]:
    """
    The windows of a row that is longer than `limit`, about as many labels in each; none has more tokens than `limit`.

    A window has what the row begins with, so that an answer is still an answer to its question: the tokens before the
    first label, a fourth of the window at most, and of a text its BOS token, if there is one. Then come the tokens
    before the new labels, a fourth of the window at least (or the row from its beginning), and the new labels.

    Args:
        labels: -100 where a token is none; nothing predicts the first one.
        limit: 2 or more.
        starts_with_bos: whether the row's first token is BOS.
    """
    places = [place for place, label in enumerate(labels) if label != -100 and place > 0]
    if not places:
        return []
    before = places[0] if labels[0] == -100 else int(starts_with_bos)
    head = min(before, limit // SHARE)
    reach = limit - head - max(1, limit // SHARE)
    most = len(_chunks(places, reach))
    # the last window would have what is left over, perhaps the end of the turn alone
    even = bisect_left(range(1, reach), True, key=lambda narrower: len(_chunks(places, narrower)) <= most) + 1
    found: list[Window] = []
    for first, end in _chunks(places, even):
        if end <= limit:
            first = first if found else 0  # a text's first token is no label in effect, and stays as it is
            found.append(Window(0, 0, first, end))
        else:
            found.append(Window(head, end - limit + head, first, end))
    return found


def _chunks(places: Sequence[int], reach: int) -> list[tuple[int, int]]:
    """The places in a row of stretches of `reach` at most, each from its first place to behind its last."""
    chunks, i = [], 0
    while i < len(places):
        after = bisect_left(places, places[i] + reach, lo=i)
        chunks.append((places[i], places[after - 1] + 1))
        i = after
    return chunks


def in_windows(name: str, rows: Dataset, limit: Limit | None, long_rows: str, bos: int | None) -> Dataset:
    """
    Tokenised rows, in place of each that is too long its windows: rows of their own, after one another.

    Where there are windows, a column `row` says which row each is of.

    Args:
        name: of the argument that the rows were given as.
        rows: `input_ids`, `labels`, and perhaps `expert`, which all windows of a row share.
        limit: the longest row that is left as it is.
        long_rows: `"windows"` or `"error"`.
        bos: the token that begins a text, if there is one.

    Raises:
        ValueError: `long_rows` is `"error"`, and rows are too long.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    too_long = [row for row, length in enumerate(lengths) if limit is not None and length > limit.tokens]
    if limit is None or not too_long:
        return rows
    if long_rows == "error":
        listed = ", ".join(f"row {row} has {lengths[row]}" for row in too_long[:LISTED])
        more = f" and {len(too_long) - LISTED} more" if len(too_long) > LISTED else ""
        lost = sum(lengths[row] - limit.tokens for row in too_long)
        of, tokens = counted(len(rows), "row"), counted(lost, "token")
        raise ValueError(
            f"`{name}` has {len(too_long)} of {of} longer than {limit.source} ({listed}{more}), so that {tokens} "
            "would be lost. Set `long_rows='windows'` to have them trained "
            "in overlapping windows, raise `max_length` as far as the model has positions, or shorten the rows."
        )

    def cut(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        cut_rows: dict[str, list[Any]] = {column: [] for column in (*batch, "row")}
        for place, row in enumerate(numbers):
            ids, labels = batch["input_ids"][place], batch["labels"][place]
            parts = [(ids, labels)]
            if len(ids) > limit.tokens:
                parts = [one.cut(ids, labels) for one in windows(labels, limit.tokens, ids[0] == bos)] or [
                    (ids[: limit.tokens], labels[: limit.tokens])  # without a label; that is said elsewhere
                ]
            for part_ids, part_labels in parts:
                own = {"input_ids": part_ids, "labels": part_labels, "row": row}
                for column, values in cut_rows.items():
                    values.append(own[column] if column in own else batch[column][place])
        return cut_rows

    columns = [column for column in ("input_ids", "labels", "expert") if column in rows.column_names]
    found = rows.select_columns(columns).map(cut, batched=True, with_indices=True, desc=f"Cutting {name} into windows")
    they_are = "It is" if len(too_long) == 1 else "They are"
    logger.warning(
        f"`{name}` has {len(too_long)} of {counted(len(rows), 'row')} longer than {limit.source}. {they_are} trained "
        f"in {len(found) - len(rows) + len(too_long)} overlapping windows, each a row of its own (`long_rows`)."
    )
    return found
