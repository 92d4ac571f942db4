# SPDX-License-Identifier: Apache-2.0
"""A grid of models on one benchmark: target, oracles and methods, a folder each; it resumes where it stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer

from alter_peft.evaluation.attacks import ATTACKS, LEARNING_RATE
from alter_peft.evaluation.packages import require_packages
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tasks import read_choices
from alter_peft.options import check_counts, check_known, json_object, parse_values

from .cell import Cell
from .methods import METHODS, read_options
from .setting import books_setting, tofu_setting


# What does not change the figures of a cell: methods, seeds, tasks and attacks may join a grid later
JOINABLE = {"output_dir", "methods", "seeds", "oracle_seeds", "attacks", "tasks", "limit", "form", "options"}
JOINABLE |= {"batch_size", "relearning_rate"}
WAIT = timedelta(days=1)  # of the other processes for the main one, which measures


@dataclass
class BenchmarkArguments:
    """
    A grid: every method with every seed, beside the target and the oracles.

    model: folder or Hub id of the model that is taught the data, and then made to forget a part of it.
    output_dir: where each cell gets a folder; those that are there already are not run again.
    data: folder with TOFU's JSON lines, or its Hub data set.
    split: what of TOFU is forgotten.
    books: instead of TOFU, arguments of `read_books`: `forget`, `retain` and so on; JSON on the command line.
    retain_rows: the target is taught, and a method is given, so many retain rows; all by default.
    rows: questions of each other set that are asked, spread over it; all by default.
    answered: questions of each set that are answered in full, for ROUGE-L; all by default.
    max_new_tokens: of such an answer.
    batch_size: rows of an evaluation batch; by default those of `score_answers` and `generate_answers`.
    requests: the forget set comes as so many requests, one after another, instead of at once.
    methods: names of `METHODS`.
    seeds: of the methods.
    oracle_seeds: two at least: their spread is the unit of every distance.
    attacks: names of `ATTACKS`.
    relearning_rate: learning rate of the attack `relearning`.
    tasks, limit, form: multiple choice that each model is asked, as in `evaluate_choices`.
    options: method -> options of its training, or `"teach"` -> those of the target's and the oracles'; JSON on the
        command line.
    target: a model that was taught the data already, instead of teaching `model`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of the model that is taught and then made to forget."})
    output_dir: str = field(metadata={"help": "Folder of the results, one folder a cell inside."})
    data: str = field(default="locuslab/TOFU", metadata={"help": "Folder of TOFU's JSON lines, or a Hub data set."})
    split: Literal["forget01", "forget05", "forget10"] = field(
        default="forget01", metadata={"help": "What of TOFU is forgotten."}
    )
    books: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Books instead of TOFU: arguments of `read_books`, as JSON."}
    )
    retain_rows: int | None = field(default=None, metadata={"help": "Retain rows taught and kept (default: all)."})
    rows: int | None = field(default=None, metadata={"help": "Questions asked of each other set (default: all)."})
    answered: int | None = field(default=None, metadata={"help": "Questions answered in full (default: all)."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens of such an answer."})
    batch_size: int | None = field(default=None, metadata={"help": "Rows of an evaluation batch."})
    requests: int | None = field(default=None, metadata={"help": "Split the forget set into so many requests."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Some of {', '.join(METHODS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the methods."})
    oracle_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the oracles."})
    attacks: list[str] = field(
        default_factory=list, metadata={"help": f"Some of {', '.join(ATTACKS)} (default: none)."}
    )
    relearning_rate: float = field(default=LEARNING_RATE, metadata={"help": "Learning rate of the attack relearning."})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Multiple choice: tasks of lm-evaluation-harness, or files."}
    )
    limit: int | None = field(default=None, metadata={"help": "Questions of each task, at most."})
    form: Literal["letters", "texts"] = field(
        default="letters", metadata={"help": "Whether letters or texts of a file's choices are compared."}
    )
    options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Method, or "teach" -> training options, as JSON.'}
    )
    target: str | None = field(default=None, metadata={"help": "A model that was taught the data already."})

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            self.options = json_object("options", self.options)
        self.options = {} if self.options is None else self.options
        if not (isinstance(self.options, dict) and all(isinstance(own, dict) for own in self.options.values())):
            raise ValueError(f"`options` is {self.options!r}, but must be method -> {{option: value}}.")
        others = {name: value for name, value in vars(self).items() if name != "options"}
        for name, value in parse_values(BenchmarkArguments, others).items():
            setattr(self, name, value)
        if isinstance(self.books, str):
            self.books = json_object("books", self.books)
        check_counts(self, ("answered", "rows", "retain_rows", "limit", "max_new_tokens", "batch_size", "requests"))
        if not self.relearning_rate > 0:
            raise ValueError(f"`relearning_rate` is {self.relearning_rate}, but must be above 0.")
        for name, known in (("methods", METHODS), ("attacks", ATTACKS), ("options", {**METHODS, "teach": None})):
            check_known(name, getattr(self, name), known)
        for name in ("methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty. Give at least one.")
        for name in ("seeds", "oracle_seeds"):
            unusable = [seed for seed in getattr(self, name) if not 0 <= seed < 2**32]
            if unusable:
                raise ValueError(f"`{name}` has {unusable}, but must be from 0 to 2**32 - 1.")
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"`output_dir` is {self.output_dir!r}, but that is a file. Give a folder.")
        PartialState(timeout=WAIT)  # before the trainers' arguments, which would connect the processes for 30 minutes
        self.options = {name: read_options(name, own) for name, own in self.options.items()}
        if len(set(self.oracle_seeds)) < 2:
            raise ValueError(
                f"`oracle_seeds` is {self.oracle_seeds}, but a benchmark needs 2 oracles at least: their spread is "
                "the unit in which every score is read."
            )
        if self.attacks and (self.requests is not None or self.books is not None):
            other = "requests" if self.books is None else "books"
            raise ValueError(
                f"`attacks` is set, but they are for questions forgotten at once. Remove it or `{other}`."
            )
        if self.books is not None:
            unread = [name for name in ("requests", "rows", "retain_rows") if getattr(self, name) is not None]
            if unread:
                raise ValueError(f"`{unread[0]}` is set, but it is of TOFU alone. Remove it or `books`.")


class Grid:
    """
    A benchmark that is ready to run: its data are read, and what is there already is of the same settings.

    Raises:
        ValueError: unusable data or model, or results of other settings in `output_dir`.
    """

    def __init__(self, args: BenchmarkArguments) -> None:
        source = args.target or args.model
        try:
            AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            name = "target" if args.target else "model"
            raise ValueError(
                f"`{name}` is {source!r}, which could not be loaded ({error}). Give a folder or a Hub id."
            ) from error
        require_packages("rouge_score", *(["sacrebleu"] if args.books is not None else []))
        if args.tasks:
            require_packages("lm_eval")
            read_choices(args.tasks, args.limit, args.form)
        setting = tofu_setting(args) if args.books is None else books_setting(args, tokenizer)
        settings = {name: value for name, value in asdict(args).items() if name not in JOINABLE}
        settings["processes"] = PartialState().num_processes  # batches are of each process
        names = [("target", 0), *(("oracle", seed) for seed in args.oracle_seeds)]
        names += [(method, seed) for method in args.methods for seed in args.seeds]
        self.cells = [Cell(args, setting, tokenizer, settings, name, seed) for name, seed in names]

    def run(self) -> list[Result]:
        """
        Run every cell that is not there yet, and return all of them: target, oracles, then the methods.

        A cell that fails is a result with `error`, and is tried again by the next run; without a target there is
        nothing to compare, so its failure to be taught or measured is raised. Under `accelerate launch` the processes
        train together, and the main one measures while the others wait; a failure in training is then raised, since
        the other processes would wait for this one.
        """
        return [cell.run() for cell in self.cells]


def run_benchmark(args: BenchmarkArguments) -> list[Result]:
    """The results of a grid, run as far as it isn't there yet."""
    return Grid(args).run()
