# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the trainer is given, checked before any compute is spent, and the sub-domains in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from datasets import Dataset

from alter_peft.subdomains import discover_subdomains
from alter_peft.tuner.config import AlterConfig


KNOWN_COLUMNS = {"prompt", "completion", "messages", "text", "domain"}


def checked_dataset(
    name: str, dataset: Any, text_field: str, formatting_func: Callable[[dict[str, Any]], str] | None = None
) -> Dataset:
    """
    The data set, its rows turned into text by `formatting_func` if there is one.

    Raises:
        ValueError: unless it is a non-empty map-style data set in a format that TRL knows.
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
    if formatting_func is not None:
        formatted = {text_field: [formatting_func(row) for row in dataset]}
        return Dataset.from_dict(formatted | ({"domain": dataset["domain"]} if "domain" in dataset.features else {}))
    columns = set(dataset.column_names)
    known = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {text_field}, {"input_ids"})
    typos = [
        c for c in sorted(columns) if c not in KNOWN_COLUMNS and get_close_matches(c.lower(), KNOWN_COLUMNS, 1, 0.8)
    ]
    if typos:
        raise ValueError(
            f"`{name}` has the unknown columns {typos}, which look like some of {sorted(KNOWN_COLUMNS)}. Rename or "
            "remove them."
        )
    if not any(form <= columns for form in known):
        raise ValueError(
            f"`{name}` has the columns {sorted(columns)}, which name no known format. Rename them to 'prompt' and "
            f"'completion', to 'messages', or to {text_field!r} (`dataset_text_field`), or pass `formatting_func`."
        )
    return dataset


def keep_input_columns(dataset: Dataset, text_field: str) -> Dataset:
    """Without the columns that no trainer reads."""
    known = {"prompt", "completion", "messages", "conversations", text_field, "input_ids", "labels", "completion_mask"}
    known |= {"assistant_masks", "tools", "chat_template_kwargs"}
    return dataset.select_columns([name for name in dataset.column_names if name in known])


def assign_experts(config: AlterConfig, forget: Dataset, text_field: str, seed: int) -> tuple[AlterConfig, list[int]]:
    """
    The expert 1..N of every forget row, and the config with `domains` and `num_forget_experts` filled in.

    The sub-domains are the values of the column `domain` where there is one, and discovered in the texts otherwise.

    Raises:
        ValueError: a `domain` that isn't among `domains`, or more sub-domains than `num_forget_experts`.
    """
    if "domain" in forget.column_names:
        column = list(forget["domain"])
        if None in column:
            raise ValueError(
                f"`train_dataset` has no `domain` in row {column.index(None)} (None). Name every row's "
                "sub-domain, or remove the column to have them discovered."
            )
        values = [str(value) for value in column]
        names = config.domains or list(dict.fromkeys(values))
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"`train_dataset` has rows of `domain` {unknown}, which are not among `domains`={config.domains}. Add "
                "them to `AlterConfig.domains` or correct the column."
            )
        labels = [names.index(value) for value in values]
    else:
        wanted = config.num_forget_experts
        labels, names = discover_subdomains([row_text(row, text_field) for row in forget], wanted, seed)
        if config.domains is not None:
            if set(config.domains) != set(names):
                raise ValueError(
                    f"`domains` is {config.domains}, but `train_dataset` has no column `domain` that says which rows "
                    "are which. Add it, or leave `domains` unset to have sub-domains discovered."
                )
            labels = [config.domains.index(names[label]) for label in labels]
            names = config.domains
    if config.num_forget_experts is not None and len(names) > config.num_forget_experts:
        raise ValueError(
            f"`train_dataset` has {len(names)} sub-domains ({', '.join(names)}), but the adapter has "
            f"`num_forget_experts`={config.num_forget_experts}. Create it with `AlterConfig(domains={names!r})`."
        )
    # experts beyond the sub-domains of this data stay as they are, and unnamed
    spare = [f"unused-{d}" for d in range(len(names), config.num_forget_experts or 0)]
    domains = [*names, *spare]
    return replace(config, domains=domains, num_forget_experts=len(domains)), [1 + label for label in labels]


def check_unscaled(config: AlterConfig) -> None:
    """Raise a `ValueError` if an expert is scaled: it would be trained for another factor than it is used with."""
    if set(config.scales) != {1.0}:
        raise ValueError(
            f"`expert_scales` is {config.expert_scales}, but experts are trained at scale 1. Set those domains to 1 "
            "by `set_expert_scale`, train, and scale them again."
        )


def row_text(row: dict[str, Any], text_field: str) -> str:
    """All text of a row, whatever its format."""
    parts = [row[key] for key in ("prompt", "completion", "messages", "conversations", text_field) if key in row]
    return " ".join(_flat(part) for part in parts)


def _flat(part: Any) -> str:
    if isinstance(part, str):
        return part
    return " ".join(str(message.get("content", message.get("value", ""))) for message in part)


def check_all_labelled(name: str, before: Dataset, after: Dataset, max_length: int | None) -> None:
    """Raise a `ValueError` if preparation dropped rows that truncation left without a label, or if one has none."""
    lost = len(before) - len(after)
    if lost:
        raise ValueError(
            f"{lost} of {len(before)} rows of `{name}` have no label left after truncation to `max_length`="
            f"{max_length} tokens. Raise `max_length` or shorten the prompts."
        )
    empty = [i for i, labels in enumerate(after["labels"]) if not has_label(labels)]
    if empty:
        raise ValueError(
            f"{len(empty)} rows of `{name}` have no labelled token, the first is row {empty[0]}. Give every row a "
            "completion (or `labels` other than -100 after the first token)."
        )


def has_label(labels: Sequence[int]) -> bool:
    """Whether any token but the first, which nothing predicts, is labelled."""
    return any(label != -100 for label in labels[1:])
