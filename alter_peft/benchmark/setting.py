# SPDX-License-Identifier: Apache-2.0
"""What a grid is about: what a method is given, what target and oracles are taught, and what all are asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.attacks import Rows
from alter_peft.evaluation.book_data import read_books
from alter_peft.evaluation.books import evaluate_books
from alter_peft.evaluation.guards import measure_guards
from alter_peft.evaluation.measure import Score
from alter_peft.evaluation.tofu import ask_tofu, measure_tofu, read_tofu

from .methods import Task
from .requests import split_requests


if TYPE_CHECKING:
    from .grid import BenchmarkArguments


KEPT = ("retain", "real_authors", "world_facts")  # the sets of TOFU that model utility is made of
GUARDED = ("forget", "retain", "world_facts")  # the sets of TOFU whose guards are measured


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
    evaluate: Callable[[Any, PreTrainedTokenizerBase, Any], dict[str, Score]]
    rows: Rows
    requests: list[list[Pair]] | None = None
    kept_sets: dict[str, list[Pair]] | None = None


def tofu_setting(args: BenchmarkArguments) -> Setting:
    """TOFU: the authors of one split are forgotten, the others kept."""
    data = read_tofu(args.data, args.split, args.retain_rows, args.rows)

    def evaluate(model: Any, tokenizer: PreTrainedTokenizerBase, judge: Any) -> dict[str, Score]:
        asked = ask_tofu(model, tokenizer, data, args.answered, args.max_new_tokens, args.batch_size)
        if args.requests is not None:  # several adapters route each token, so that none of them alone is astray
            return measure_tofu(asked)
        return measure_tofu(asked) | measure_guards([asked[name] for name in GUARDED], judge)

    return Setting(
        Task(as_rows(data.forget), as_rows(data.retain), as_rows(data.calibration)),
        as_rows(data.forget + data.retain),
        as_rows(data.retain),
        evaluate,
        Rows(
            data.forget,
            data.retain,
            data.holdout,
            data.sets["paraphrased"],
            args.answered,
            args.max_new_tokens,
            args.batch_size,
            args.relearning_rate,
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

    def evaluate(model: Any, tokenizer: PreTrainedTokenizerBase, judge: Any) -> dict[str, Score]:
        return evaluate_books(model, tokenizer, data, args.answered, args.batch_size or 8, judge, guards=True)

    return Setting(
        Task(data.forget_rows, data.retain_rows, data.calibration_rows),
        concatenate_datasets([data.forget_rows.remove_columns("domain"), data.retain_rows]),
        data.retain_rows,
        evaluate,
        Rows(data.forget, data.retain, data.holdout),
    )


def as_rows(pairs: list[Pair]) -> Dataset:
    """Questions and answers as the trainers take them."""
    return Dataset.from_list([{"prompt": pair.prompt, "completion": pair.completion} for pair in pairs])
