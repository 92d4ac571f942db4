# SPDX-License-Identifier: Apache-2.0
"""The rows that a trainer is given, checked and under the names that TRL knows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, Value

from alter_peft.reading.canonical import Row, features
from alter_peft.reading.columns import ALTERNATE, EXTRAS, OTHERS, SUBJECT, Taken, Unrecognised, choose
from alter_peft.reading.given import is_free, named_rows
from alter_peft.reading.rows import described, is_domain
from alter_peft.reading.values import Unusable, filled, texts


logger = logging.getLogger(__name__)  # not accelerate's, which needs a process state that is made later
# What TRL reads, beside the column `dataset_text_field`
INPUT_COLUMNS = {"prompt", "completion", "messages", "conversations", "input_ids", "labels", "completion_mask"}
INPUT_COLUMNS |= {"assistant_masks", "tools", "chat_template_kwargs"}
OF_CHATS = ("tools", "chat_template_kwargs")  # what TRL hands to the chat template
BATCH = 1000  # rows that are in memory at once


def checked_dataset(
    name: str,
    dataset: Any,
    text_field: str,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    answers_alone: bool = True,
) -> Dataset:
    """
    The rows under the names that TRL knows, every value checked; what else they have is left alone.

    Names that the field uses (`alter_peft/reading/columns.py`) are recognised, and numbers become text. Of chats every
    turn of the assistant becomes a row, with all turns before it as its prompt.

    Args:
        name: the argument of the trainer, for messages.
        text_field: the column of plain texts.
        formatting_func: makes a text of a row, if there is one.
        answers_alone: whether the assistant's turns alone are learned from, not a chat as a whole.

    Raises:
        ValueError: unless it is a non-empty map-style data set whose text can be told from its columns' names, and
            every row of which has an answer, or a text.
    """
    if dataset is None:
        raise ValueError(f"`{name}` is required: ALTER needs both the rows to forget and rows to retain.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but must be a `datasets.Dataset`: phase I passes over all rows "
            "before training. Collect a stream with `Dataset.from_generator`, or choose one split of a `DatasetDict`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row.")
    if dataset.format["type"] == "custom":
        raise ValueError(f"`{name}` has a transform (`with_transform`). Make its rows once and for all by `map`.")
    dataset = dataset.with_format(None)
    if formatting_func is not None:
        return _formatted(name, dataset, text_field, formatting_func)
    first = dataset.with_format("arrow")[:1].to_pylist()[0]
    try:
        taken = choose(dataset.column_names, first, text_field=text_field, extras=(*EXTRAS, SUBJECT))
    except Unrecognised as error:
        raise ValueError(
            f"`{name}` {error}. Rename them to 'prompt' and 'completion', to 'messages', or to {text_field!r} "
            "(`dataset_text_field`), or pass `formatting_func`."
        ) from error
    return _named(name, dataset, _of_training(name, dataset, taken), text_field, answers_alone)


def of_each(name: str, given: Any, make: Callable[[str, Any], Dataset]) -> Any:
    """What is made of the data set of this argument, of each of several by name, or of none."""
    if isinstance(given, dict):
        return {inner: make(f"{name}[{inner!r}]", rows) for inner, rows in given.items()}
    return None if given is None else make(name, given)


def keep_input_columns(dataset: Dataset, text_field: str) -> Dataset:
    """Without the columns that no trainer reads."""
    return dataset.select_columns([c for c in dataset.column_names if c in INPUT_COLUMNS or c == text_field])


def given_subjects(dataset: Dataset) -> list[list[str]] | None:
    """The names of each row's subject, where the user says them."""
    if SUBJECT not in dataset.column_names:
        return None
    return [texts(value) for value in dataset[SUBJECT]]


def _formatted(name: str, dataset: Dataset, text_field: str, form: Callable[[dict[str, Any]], str]) -> Dataset:
    made = []
    for number, row in enumerate(dataset):
        try:
            made.append(filled(form(row)))
        except Unusable as error:
            raise ValueError(f"`formatting_func` made no text of row {number} of `{name}`, {error}.") from error
    kept = {column: dataset[column] for column in ("domain", SUBJECT) if column in dataset.features}
    return Dataset.from_dict({text_field: made, **kept})


def _of_training(name: str, dataset: Dataset, taken: Taken) -> Taken:
    """Without what rows are evaluated with, and the sub-domains and subjects of rows that are not forgotten."""
    unread = {*OTHERS} - {ALTERNATE} if name == "train_dataset" else {*EXTRAS, SUBJECT}
    columns = {own: column for own, column in taken.columns.items() if own not in unread}
    maybe = taken.maybe_domain if name == "train_dataset" else None
    if maybe is not None:
        batches = dataset.select_columns(maybe).iter(BATCH)
        values = Counter(None if value is None else str(value) for batch in batches for value in batch[maybe])
        maybe = maybe if is_domain(values, len(dataset)) else None
    is_left = maybe != taken.maybe_domain and taken.maybe_domain not in columns.values()
    left = (*taken.left, str(taken.maybe_domain)) if is_left else taken.left
    return replace(taken, columns=columns, maybe_domain=maybe, left=left)


def _named(name: str, dataset: Dataset, taken: Taken, text_field: str, answers_alone: bool) -> Dataset:
    """The rows under their names, made anew where values must change."""
    domain = taken.columns.get("domain") or taken.maybe_domain
    columns = {column: text_field if role == "text" else role for role, column in taken.columns.items()}
    columns |= {domain: "domain"} if domain else {}
    if taken.kind == "chats" and not answers_alone and taken.columns["messages"] == "conversations":
        columns["conversations"] = "conversations"  # which TRL knows
    kept = [column for column in OF_CHATS if column in dataset.column_names] if "chat" in taken.kind else []
    taken = replace(taken, left=tuple(column for column in taken.left if column not in kept))
    serves_twice = domain is not None and domain == taken.columns.get(SUBJECT)
    if _stays(dataset, taken, answers_alone) and not serves_twice:
        own = dataset.select_columns([*columns])
        for start in range(0, 0 if is_free(dataset, taken) else len(dataset), BATCH):
            for number, row in enumerate(own.with_format("arrow")[start : start + BATCH].to_pylist(), start=start):
                named_rows(name, number, row, taken)
        named = dataset.select_columns([*columns, *kept])
        named = named.rename_columns({column: to for column, to in columns.items() if column != to})
    else:
        named = _made_anew(name, dataset, taken, text_field, kept)
    changed = any(column != to for column, to in columns.items())
    if changed or taken.left or (taken.kind == "chats" and answers_alone):
        logger.warning(f"`{name}`: {described(taken, named)}.")
    return named


def _stays(dataset: Dataset, taken: Taken, answers_alone: bool) -> bool:
    """Whether the values are what TRL reads, so that their columns need other names at most."""
    if taken.kind in ("tokens", "chat pairs"):
        return True
    if taken.kind == "chats":
        return not answers_alone
    told = [column for role, column in taken.columns.items() if role in ("prompt", "completion", "text")]
    whole = taken.kind in ("pairs", "text") and not taken.beside and "masked" not in taken.columns
    return whole and all(_is_text(dataset.features[column]) for column in told)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _made_anew(name: str, dataset: Dataset, taken: Taken, text_field: str, kept: list[str]) -> Dataset:
    """Rows whose values have to change: numbers, several columns in one, chats; `kept` goes along with each."""
    made = dict(features(taken, "domain" in taken.columns or taken.maybe_domain is not None))
    made = {text_field if column == "text" else column: feature for column, feature in made.items()}
    made |= {column: dataset.features[column] for column in kept}
    free = taken.kind == "chats" and is_free(dataset, taken)
    if free:
        made |= dict.fromkeys(("prompt", "completion"), dataset.features[taken.columns["messages"]])

    def convert(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        found: list[Row] = []
        for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            for one in named_rows(name, number, row, taken, free):
                one |= {column: row[column] for column in kept}
                found.append(one | ({text_field: one["text"]} if "text" in one else {}))
        return {column: [one.get(column) for one in found] for column in made}

    names = dataset.column_names
    return dataset.map(convert, batched=True, with_indices=True, remove_columns=names, features=Features(made))
