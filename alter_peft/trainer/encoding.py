# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set -> token ids and labels, before TRL would make them: what is an answer is said in one place."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml

from alter_peft.chat import encode_row, with_template_defaults


def encoded(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    as_chat: bool | None = None,
    text_field: str = "text",
    answers_only: bool = True,
    num_proc: int | None = None,
) -> Dataset:
    """
    The data set with `input_ids` and `labels`, which TRL then takes as they are; as it is if it has the former.

    Args:
        as_chat: whether `prompt` and `completion` strings are turns of a chat; by default if there is a template.
        answers_only: whether answers alone are labelled: the assistant's turns, completions; of a text all is.

    Raises:
        ValueError: a chat is wanted, but the tokenizer has no chat template; see [`encode_conversation`].
    """
    if as_chat and not tokenizer.chat_template:
        raise ValueError(
            "`as_chat` is True, but the tokenizer has no chat template. Set `chat_template_path`, or leave `as_chat` "
            "unset to take the rows as they are."
        )
    if "input_ids" in dataset.column_names:
        return dataset
    options = {"tokenizer": tokenizer, "text_field": text_field, "as_chat": as_chat, "answers_only": answers_only}
    with PartialState().main_process_first():
        return dataset.map(encoded_row, fn_kwargs=options, num_proc=num_proc, desc="Tokenizing")


def encoded_row(row: dict[str, Any], **options: Any) -> dict[str, list[int]]:
    """As [`encode_row`], of any names that TRL knows for the turns of a chat."""
    return encode_row(maybe_convert_to_chatml(deepcopy(dict(row))), **options)


def set_template_defaults(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any] | None) -> None:
    """Write the values into the tokenizer's own template, which is saved with it."""
    if values:
        tokenizer.chat_template = with_template_defaults(tokenizer.chat_template, values)
