# SPDX-License-Identifier: Apache-2.0
"""Rows of a `datasets.Dataset` that an argument gives -> rows under the names that trainers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, List

from .canonical import BadCell, Row, canonical, cell
from .chats import SAID, SPEAKER, answers
from .columns import SUBJECT, Taken
from .values import shown, texts


def is_free(dataset: Dataset, taken: Taken) -> bool:
    """Whether the values are left to TRL and the chat template: token ids, and turns that hold more than texts."""
    if "chat" not in taken.kind:
        return taken.kind == "tokens"
    return any(_turn_keys(dataset.features[column]) - {*SPEAKER, *SAID} for column in taken.columns.values())


def _turn_keys(feature: Any) -> set[str]:
    """What each turn of a chat holds."""
    inner = feature[0] if isinstance(feature, list) else feature.feature if isinstance(feature, List) else None
    return set(inner) if isinstance(inner, dict) else set()


def named_rows(name: str, number: int, row: Mapping[str, Any], taken: Taken, free: bool = False) -> list[Row]:
    """
    As `canonical`; the turns of free chats stay as they are.

    Args:
        name: the argument that the rows were given by, and `number` the row's, from 0, for messages.

    Raises:
        ValueError: a value that is none of what its column must hold.
    """
    try:
        if not free:
            return canonical(row, taken)
        if taken.kind == "chat pairs":
            return [{"prompt": row[taken.columns["prompt"]], "completion": row[taken.columns["completion"]]}]
        pairs = cell(row, taken.columns["messages"], answers)
        extra = {"domain": row["domain"]} if "domain" in taken.columns else {}
        extra |= {SUBJECT: cell(row, taken.columns[SUBJECT], texts)} if SUBJECT in taken.columns else {}
        return [{"prompt": before, "completion": answer} | extra for before, answer in pairs]
    except BadCell as error:
        raise ValueError(
            f"`{name}` has {shown(error.value)} in row {number} of the column {error.column!r}, {error.problem}."
        ) from error
