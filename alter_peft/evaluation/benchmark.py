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
"""A grid of models on one benchmark: target, oracles and methods, a folder each; it resumes where it stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState, logging
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft.options import json_object

from .answers import Pair, score_answers
from .attacks import ATTACKS, attack
from .choices import evaluate_choices
from .methods import METHODS, load, teach
from .results import Result
from .sequential import run_requests
from .settings import Setting, books_setting, tofu_setting
from .tokens import token_page


logger = logging.get_logger(__name__)
# What does not change the figures of a cell: methods, seeds and attacks may join a grid later
JOINABLE = {"output_dir", "methods", "seeds", "oracle_seeds", "attacks", "tasks", "options", "batch_size"}
WAIT = timedelta(days=1)  # of the other processes for the main one, which measures
UNMEASURED = "stopped before it was measured"


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
        self.options = self.options or {}
        if isinstance(self.books, str):
            self.books = json_object("books", self.books)
        for name, known in (("methods", METHODS), ("attacks", ATTACKS), ("options", {**METHODS, "teach": None})):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"`{name}` has {unknown}, but must be some of {list(known)}.")
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
        if self.requests is not None and self.books is not None:
            raise ValueError("`requests` is set, but books are forgotten at once. Remove it or `books`.")


def run_benchmark(args: BenchmarkArguments) -> list[Result]:
    """
    Run every cell that is not there yet, and return all of them: target, oracles, then the methods.

    A cell that fails is a result with `error`, and is tried again by the next run; without the target there is
    nothing to compare, so its failure is raised. Under `accelerate launch` the processes train together, and the main
    one measures while the others wait.

    Raises:
        ValueError: unusable data, or results of other settings in `output_dir`.
    """
    PartialState(timeout=WAIT)
    tokenizer = AutoTokenizer.from_pretrained(args.target or args.model)
    setting = tofu_setting(args) if args.books is None else books_setting(args, tokenizer)
    cells = [("target", 0), *(("oracle", seed) for seed in args.oracle_seeds)]
    cells += [(method, seed) for method in args.methods for seed in args.seeds]
    found = {cell: _Cell(args, setting, tokenizer, *cell) for cell in cells}
    for cell in found.values():
        cell.check()
    return [cell.run() for cell in found.values()]


class _Cell:
    """One model of the grid, in a folder of its own."""

    def __init__(
        self,
        args: BenchmarkArguments,
        setting: Setting,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        seed: int,
    ) -> None:
        self.args, self.setting, self.tokenizer, self.name, self.seed = args, setting, tokenizer, name, seed
        out = Path(args.output_dir)
        self.target = Path(args.target) if args.target else out / "target" / "model"
        self.folder = out / ("target" if name == "target" else f"{name}-{seed}")
        self.path = self.folder / "result.json"
        assert isinstance(args.options, dict)
        self.options = args.options.get("teach" if name in ("target", "oracle") else name, {})
        self.settings = {key: value for key, value in asdict(args).items() if key not in JOINABLE}
        self.settings["options"] = self.options

    def check(self) -> None:
        """Raise a `ValueError` if the folder has a result of other settings."""
        if not self.path.is_file():
            return
        before = Result.load(self.path).settings
        changed = [key for key in self.settings if before.get(key) != self.settings[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"`{key}` is {self.settings[key]!r}, but {self.path} was made with {before.get(key)!r}. Choose "
                "another `output_dir`, or remove that folder."
            )

    def run(self) -> Result:
        """What is missing of the cell: training, scores, tasks, attacks."""
        result = Result.load(self.path) if self.path.is_file() else Result(self.name, self.seed)
        result.settings, result.machine = self.settings, Result(self.name, self.seed).machine
        wanted = [f"task: {name}" for name in self.args.tasks] + [f"attack: {name}" for name in self.args.attacks]
        missing = [part for part in wanted if part not in result.seconds]
        if result.error is None and result.scores and not missing:
            return result
        print(f"{self.folder.name}: {', '.join(missing) if result.scores else 'training, evaluation'}", flush=True)
        try:
            set_seed(self.seed)
            model = self._model(result)
            result.error = None
            if PartialState().is_main_process:
                self._measure(result, model, missing)
        except Exception as error:
            if self.name == "target":
                raise
            logger.warning("%s failed", self.folder.name, exc_info=True)
            result.error = f"{type(error).__name__}: {error}"
        self._save(result)
        PartialState().wait_for_everyone()
        return result

    def _save(self, result: Result) -> None:
        if PartialState().is_main_process:
            result.save(self.path)

    def _model(self, result: Result) -> Any:
        """The trained model, from the folder if it is there."""
        if self.name == "target" and self.args.target:
            return load(self.target)
        if self.name in ("target", "oracle"):
            return self._taught(result)
        trained = "training" in result.seconds and self.setting.requests is None
        if trained:
            return PeftModel.from_pretrained(load(self.target), self.folder).eval()
        with _timing(result, "training"):
            model = self._unlearned(result)
        result.error = UNMEASURED
        self._save(result)
        return model

    def _taught(self, result: Result) -> PreTrainedModel:
        place = self.folder / "model"
        if (place / "config.json").is_file():
            return load(place)
        rows = self.setting.taught if self.name == "target" else self.setting.kept
        with _timing(result, "training"):
            model = teach(load(self.args.model), self.tokenizer, rows, place, self.seed, **self.options)
        result.error = UNMEASURED
        self._save(result)
        return model

    def _unlearned(self, result: Result) -> PeftModel:
        model, task = load(self.target), self.setting.task
        method, requests = METHODS[self.name], self.setting.requests
        if requests is None:
            return method(model, self.tokenizer, task, self.folder, self.seed, self.options)

        def probability(current: Any, pairs: Sequence[Pair]) -> float:
            with _precision():  # around the passes alone: within, optimiser steps would not be seen
                return score_answers(current, self.tokenizer, pairs).mean

        curves, adapted = run_requests(
            method, model, self.tokenizer, requests, task, {"retain": self.setting.rows.retain}, probability,
            self.folder, self.seed, self.options,
        )  # fmt: skip
        result.curves |= curves
        return adapted

    def _measure(self, result: Result, model: Any, missing: list[str]) -> None:
        with _precision():
            if not result.scores:
                with _timing(result, "evaluation"):
                    judge = model if self.name == "target" else load(self.target) if self.name == "oracle" else None
                    result.scores = self.setting.evaluate(model, self.tokenizer, judge)
                if any(key.endswith("/astray") for key in result.scores):  # tokens are routed
                    shown = [*self.setting.rows.forget[:3], *self.setting.rows.retain[:3]]
                    page = token_page(model, self.tokenizer, shown)
                    (self.folder / "tokens.html").write_text(page, encoding="utf-8")
                self._save(result)
            for part in missing:
                kind, _, name = part.partition(": ")
                with _timing(result, part):
                    if kind == "task":
                        args = self.args
                        result.scores |= evaluate_choices(model, self.tokenizer, [name], args.limit, form=args.form)
                    else:
                        found = attack(model, self.tokenizer, self.setting.rows, [name])
                        result.scores |= found.scores
                        result.curves |= found.curves
                        result.skipped |= found.skipped
                self._save(result)


@contextmanager
def _timing(result: Result, part: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    result.seconds[part] = time.monotonic() - start


@contextmanager
def _precision() -> Iterator[None]:
    """bfloat16 autocast, in which all of a grid is measured."""
    device = PartialState().device.type
    with torch.autocast(device, torch.bfloat16):
        yield
