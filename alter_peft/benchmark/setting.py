# SPDX-License-Identifier: Apache-2.0
"""What a grid is about: what a method is given, what target and oracles are taught, and what all are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.attacks import Rows
from alter_peft.evaluation.scores import Scores
from alter_peft.evaluation.tasks import measure_task, read_books, read_tofu

from .methods import Task
from .requests import split_requests


if TYPE_CHECKING:
    from .grid import BenchmarkArguments


KEPT = ("retain", "real_authors", "world_facts")  # the sets of TOFU that model utility is made of


class Setting(NamedTuple):
    """
    What a grid is about.

    task: what a method is given.
    taught, kept: rows that the target is taught, and an oracle.
    evaluate: model, tokenizer, and the target as the judge of fluency -> scores.
    rows: what the attacks ask about; also examples of what is forgotten and kept.
    requests: the forget set as requests, or `None` if it comes at once.
    kept_sets: what is asked after each request besides, as in `kept_probabilities`.
    """

    task: Task
    taught: Dataset
    kept: Dataset
    evaluate: Callable[[Any, PreTrainedTokenizerBase, Any], Scores]
    rows: Rows
    requests: list[list[Pair]] | None = None
    kept_sets: dict[str, list[Pair]] | None = None


def tofu_setting(args: BenchmarkArguments) -> Setting:
    """TOFU: the authors of one split are forgotten, the others kept."""
    data = read_tofu(args.data, args.split, args.retain_rows, args.rows)

    def evaluate(model: Any, tokenizer: PreTrainedTokenizerBase, judge: Any) -> Scores:
        guards = args.requests is None  # several adapters route each token, so that none of them alone is astray
        options = (args.answered, args.max_new_tokens, args.batch_size, judge, guards)
        return measure_task(model, tokenizer, data, *options)

    return Setting(
        Task(as_rows(data.forget), as_rows(data.retain), as_rows(data.calibration)),
        as_rows(data.forget + data.retain),
        as_rows(data.retain),
        evaluate,
        data.attack_rows(
            answered=args.answered,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            relearning_rate=args.relearning_rate,
        ),
        None if args.requests is None else split_requests(data.forget, args.requests),
        {name: data.sets[name] for name in KEPT},
    )


def books_setting(args: BenchmarkArguments, tokenizer: PreTrainedTokenizerBase) -> Setting:
    """Copyright: one book is forgotten, others kept."""
    assert isinstance(args.books, dict)
    try:
        data = read_books(tokenizer, **args.books)
    except TypeError as error:  # an argument that is unknown or missing
        raise ValueError(f"`books` is {args.books}, but must hold arguments of `read_books` ({error}).") from error

    def evaluate(model: Any, tokenizer: PreTrainedTokenizerBase, judge: Any) -> Scores:
        return measure_task(
            model, tokenizer, data, args.answered, batch_size=args.batch_size, judge=judge, guards=True
        )

    return Setting(
        Task(data.forget_rows, data.retain_rows, data.calibration_rows),
        concatenate_datasets([data.forget_rows.remove_columns("domain"), data.retain_rows]),
        data.retain_rows,
        evaluate,
        data.attack_rows(),
    )


def as_rows(pairs: list[Pair]) -> Dataset:
    """Questions and answers as the trainers take them."""
    return Dataset.from_list([{"prompt": pair.prompt, "completion": pair.completion} for pair in pairs])
