# SPDX-License-Identifier: Apache-2.0
"""A trainer whose rows become token ids and labels: chats by their template, and windows of what is too long."""

from __future__ import annotations

import copy
from math import inf
from typing import Any

from datasets import Dataset

from alter_peft.retain_rows import retain_auto
from alter_peft.scoring import Row

from .encoding import encoded, encoded_row, set_template_defaults
from .inputs import check_all_labelled
from .pairs import PairTrainer
from .rows import keep_input_columns
from .windows import Limit, in_windows


class PreparingTrainer(PairTrainer):
    """Prepares rows in place of [`~trl.SFTTrainer`]."""

    _limit: Limit | None = None  # until the model is known

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """
        As the parent's, after the rows became token ids and labels, questions and answers as turns of a chat, and
        without truncation: rows that are too long become windows, at once if the model is known by then.
        """
        if isinstance(dataset, Dataset):
            set_template_defaults(self._tokenizer, args.chat_template_kwargs)
            answers_only, processes = args.completion_only_loss is not False, args.dataset_num_proc
            dataset = encoded(dataset, self._tokenizer, args.as_chat, args.dataset_text_field, answers_only, processes)
        whole = copy.copy(args)
        whole.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, whole, packing, formatting_func, dataset_name)
        return self._in_windows(dataset_name, rows) if self._limit and isinstance(rows, Dataset) else rows

    def _tokens(self, row: dict[str, Any], answers_only: bool = True) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row that is not trained on, as long as rows may be."""
        options = {"as_chat": self.args.as_chat, "text_field": self.args.dataset_text_field}
        options["answers_only"] = answers_only
        row = encoded_row(row, tokenizer=self._tokenizer, **options)
        most = None if self._limit is None else self._limit.tokens
        return row["input_ids"][:most], row["labels"][:most]

    def _general_rows(self, like: Dataset) -> list[Row]:
        """
        General text as questions, chats or texts as these rows are, and labelled as they; tools and options of the
        chat template are left out. None if the rows are tokens already, and none that is too long to be one row.
        """
        if "input_ids" in like.column_names:
            return []
        answers_only = self.args.completion_only_loss is not False
        rows = [self._tokens(row, answers_only) for row in retain_auto(like, text_field=self.args.dataset_text_field)]
        most = inf if self._limit is None else self._limit.tokens
        return [row for row in rows if len(row[0]) < most and any(label != -100 for label in row[1][1:])]

    def _in_windows(self, name: str, rows: Dataset) -> Dataset:
        return in_windows(name, rows, self._limit, self.args.long_rows, self._tokenizer.bos_token_id)

    def _prepare_rows(self, name: str, dataset: Dataset) -> Dataset:
        """Tokenised rows, labelled by their own format: completions alone where there are prompts."""
        dataset = keep_input_columns(dataset, self.args.dataset_text_field)
        of_forget = self.completion_only_loss
        if self.args.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= set(dataset.column_names)
        try:
            prepared = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, name)
        finally:
            self.completion_only_loss = of_forget
        check_all_labelled(name, prepared)
        return prepared
