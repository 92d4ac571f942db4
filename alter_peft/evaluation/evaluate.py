# SPDX-License-Identifier: Apache-2.0
"""One model, with or without an adapter, on sets of one's own, TOFU, multiple choice and under attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alter_peft.benchmark.methods import load
from alter_peft.benchmark.setting import GUARDED

from .answers import Pair, chat_or_plain, check_scored
from .arguments import HOLDOUT, PARAPHRASED, EvaluateArguments, read_oracle, read_set
from .attacks import Rows, attack, check_rows
from .choices import measure_tasks, read_tasks
from .comparison import oracle_table, score_table
from .guards import check_guards, measure_guards
from .measure import Asked, check_routing, measure
from .packages import require_packages
from .results import Result, environment
from .tables import Table
from .tofu import TofuData, ask_tofu, measure_tofu, read_tofu


class Evaluation:
    """
    What `EvaluateArguments` ask for: all is read and loaded at once, the smallest first, so that faults show before
    anything is computed.

    Raises:
        ValueError: a file, task, model or adapter that is not there or not usable, or rows that lack what a metric or
            an attack needs.
    """

    def __init__(self, args: EvaluateArguments) -> None:
        self.args = args
        answers = set(args.attacks) - {"membership", "relearning"} or (args.sets and "rouge" in args.metrics)
        if args.tofu or answers:
            require_packages("rouge_score")
        files = {name: path for name, _, path in (entry.partition("=") for entry in args.sets)}
        self.sets = {name: read_set(name, path, args.metrics) for name, path in files.items()}
        self.oracles = [read_oracle(path) for path in args.oracles]
        self.tofu: TofuData | None = (
            read_tofu(args.tofu, args.split, args.retain_rows, args.rows) if args.tofu else None
        )
        clash = sorted(set(self.sets) & set(self.tofu.sets)) if self.tofu else []
        if clash:
            raise ValueError(f"`sets` has {clash}, which are names of TOFU's sets. Choose others.")
        self.rows = self._rows()
        self._check_attacks()
        self.tasks = self._tasks()
        self.tokenizer = chat_or_plain(_loaded("model", args.model, AutoTokenizer.from_pretrained), args.as_chat)
        self.model: Any = _loaded("model", args.model, load)
        if args.adapter is not None:
            wear = partial(PeftModel.from_pretrained, self.model)
            self.model = _loaded("adapter", args.adapter, wear).eval()
        for name in self.sets:
            check_routing(self.model, name, args.metrics)
        if args.guards:
            check_guards(self.model)
        self.judge = None if args.judge is None else self._judge(args.judge)
        for model in (self.model, self.judge):
            if model is not None:
                check_scored(model)

    def _rows(self) -> Rows:
        """What the attacks are given."""
        args = self.args
        options = (args.answered, args.max_new_tokens, args.batch_size, args.relearning_rate)
        if self.args.forget or self.tofu is None:
            forget = [pair for name in args.forget for pair in self.sets[name]]
            known = [name for name in self.sets if name not in (*args.forget, HOLDOUT, PARAPHRASED)]
            retain = [pair for name in known for pair in self.sets[name]]
            holdout = self.sets.get(HOLDOUT, []) if self.tofu is None else self.tofu.holdout
            return Rows(forget, retain, holdout, self.sets.get(PARAPHRASED, []), *options)
        data = self.tofu
        return Rows(data.forget, data.retain, data.holdout, data.sets["paraphrased"], *options)

    def _check_attacks(self) -> None:
        try:
            check_rows(self.rows, self.args.attacks)
        except ValueError as error:
            raise ValueError(f"`attacks` can't be run: {error} Name such a set in `sets`.") from error

    def _tasks(self) -> dict[str, Any]:
        if not self.args.tasks:
            return {}
        try:
            return read_tasks(self.args.tasks, self.args.limit, self.args.form)
        except ImportError as error:
            raise ValueError(f"`tasks` is set, but: {error}") from error

    def _judge(self, source: str) -> Any:
        tokenizer: PreTrainedTokenizerBase = _loaded("judge", source, AutoTokenizer.from_pretrained)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(
                f"`judge` is {source!r}, which has another tokenizer than the model. Give one with its own."
            )
        return _loaded("judge", source, load)

    def run(self) -> Result:
        """Measure part by part; the result is written after each, so that what comes later can't lose it."""
        args = self.args
        name = args.name or Path(args.adapter or args.model).name
        result = Result(name, args.seed, settings=asdict(args), environment=environment())
        device = next(self.model.parameters()).device.type
        for part, measured in self._parts():
            start = time.monotonic()
            with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                measured(result)
            result.seconds[part] = time.monotonic() - start
            result.save(Path(args.output_file))
        return result

    def _parts(self) -> Iterator[tuple[str, Callable[[Result], None]]]:
        """Name, and what adds it to the result."""
        for name, pairs in self.sets.items():
            yield f"set: {name}", partial(self._measure_set, name, pairs)
        if self.tofu is not None:
            yield "tofu", partial(self._measure_tofu, self.tofu)
        for name in self.tasks:
            yield f"task: {name}", partial(self._measure_task, name)
        for name in self.args.attacks:
            yield f"attack: {name}", partial(self._attack, name)

    def _measure_set(self, name: str, pairs: list[Pair], result: Result) -> None:
        args = self.args
        options = (name in (*args.forget, PARAPHRASED), args.answered, args.max_new_tokens, args.batch_size)
        asked = Asked(self.model, self.tokenizer, name, pairs, *options)
        result.scores |= measure(asked, args.metrics)
        if args.guards:
            result.scores |= measure_guards([asked], self.judge)

    def _measure_tofu(self, data: TofuData, result: Result) -> None:
        args = self.args
        asked = ask_tofu(self.model, self.tokenizer, data, args.answered, args.max_new_tokens, args.batch_size)
        result.scores |= measure_tofu(asked)
        if args.guards:
            result.scores |= measure_guards([asked[name] for name in GUARDED], self.judge)

    def _measure_task(self, name: str, result: Result) -> None:
        tasks, args = {name: self.tasks[name]}, self.args
        result.scores |= measure_tasks(self.model, self.tokenizer, tasks, args.limit, args.batch_size or 8)

    def _attack(self, name: str, result: Result) -> None:
        found = attack(self.model, self.tokenizer, self.rows, [name])
        result.scores |= found.scores
        result.curves |= found.curves
        result.skipped |= found.skipped

    def tables(self, result: Result) -> list[Table]:
        """The scores, and with oracles their distances and what takes several of them together."""
        beside = [oracle_table(result, self.oracles)] if self.oracles else []
        return [score_table(result, self.oracles), *beside]


def _loaded(field: str, source: str, read: Callable[[str], Any]) -> Any:
    """
    What is read from a folder or the Hub.

    Raises:
        ValueError: it can't be read.
    """
    try:
        return read(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{field}` is {source!r}, which could not be loaded ({error}). Give a folder or a Hub id."
        ) from error
