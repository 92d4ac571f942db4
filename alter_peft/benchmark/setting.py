# SPDX-License-Identifier: Apache-2.0
"""What a grid is about: what a method is given, what target and oracles are taught, and what all are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.attacks import Rows
from alter_peft.evaluation.tasks import TASKS, TaskData
from alter_peft.words import counted

from .arguments import BenchmarkArguments
from .methods import UnlearningData
from .requests import split_requests


@dataclass(frozen=True)
class Setting:
    """
    What a grid is about.

    Attributes:
        data: the task that was read, which says what is measured.
        given: what a method is given.
        taught: rows that the target is taught.
        taught_to_oracles: the same without those to be forgotten.
        rows: what the attacks ask about.
        requests: the forget set as requests, or `None` if it comes at once.
    """

    data: TaskData
    given: UnlearningData
    taught: Dataset
    taught_to_oracles: Dataset
    rows: Rows
    requests: list[list[Pair]] | None = None

    @property
    def content(self) -> dict[str, str]:
        """Set -> how many rows it has, and a hash of them: files may change under their names."""
        own = ("forget", "retain", "bystanders", "calibration", "holdout", "paraphrased")
        sets = {name: getattr(self.data, name) for name in own}
        sets |= {f"questions of {one.name}": one.pairs for one in self.data.question_sets}
        return {name: _content(pairs) for name, pairs in sets.items() if pairs}


def read_setting(args: BenchmarkArguments, tokenizer: PreTrainedTokenizerBase) -> Setting:
    """
    The task of a grid, read.

    Raises:
        ValueError: files or arguments of the task that are of no use, a task that has nothing to forget, or forget
            rows that are not shared out evenly among the requests.
    """
    name, options = args.task
    try:
        data = TASKS[name].read(tokenizer, **options)
    except TypeError as error:  # an argument that is unknown or missing
        raise ValueError(f"`{name}` is {options}, but must hold the arguments of its reader ({error}).") from error
    if not (data.forget and data.retain):
        raise ValueError(f"The task {name!r} has {len(data.forget)} rows to forget and {len(data.retain)} to retain.")
    calibration = data.calibration_rows if data.calibration else None
    own = ("answered", "max_new_tokens", "batch_size", "relearning_rate")
    return Setting(
        data,
        UnlearningData(data.forget_rows, data.retain_rows, calibration, data.as_chat, args.model),
        data.training_rows([*data.forget, *data.retain, *data.bystanders]),
        data.training_rows([*data.retain, *data.bystanders]),
        data.attack_rows(**{name: getattr(args, name) for name in own}),
        None if args.requests is None else split_requests(data.forget, args.requests),
    )


def _content(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair).encode(errors="surrogatepass"))
    return f"{counted(len(pairs), 'row')} ({digest.hexdigest()[:16]})"
