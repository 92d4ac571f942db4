# SPDX-License-Identifier: Apache-2.0
"""One model, with or without an adapter, on sets of one's own, benchmarks, multiple choice and under attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alter_peft.chat import chat_or_plain
from alter_peft.options import require_packages
from alter_peft.reading import parse_columns
from alter_peft.scoring import ScoredModel

from .answers import check_lengths
from .arguments import HOLDOUT, PARAPHRASED, EvaluateArguments, read_beside
from .attacks import ATTACKS, Rows, attack, check_rows
from .loading import load, load_tokenizer, loaded, merge_of
from .metrics import METRICS, check_model, guards_of
from .open_unlearning import composites
from .results import STOPPED, Result, environment
from .sets import read_sets
from .tables import Table, composite_table, oracle_table, result_table
from .tasks import TASKS, QuestionSet, TaskData, measure_task
from .tasks.choices import ChoiceData


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
        self._require_packages()
        self.files = {name: path for name, _, path in (entry.partition("=") for entry in args.sets)}
        self.sets, self.taken = read_sets(self.files, args.metrics, parse_columns(args.columns))
        self.oracles = [read_beside(path) for path in args.oracles]
        self.target = None if args.target is None else read_beside(args.target, "target")
        self.merge = merge_of("model", args.model)  # what the model is, if it is an adapter
        self.tokenizer = chat_or_plain(load_tokenizer(args.model, args.adapter), args.as_chat, args.template_kwargs)
        self.parts = {f"set: {name}": self._own_set(name) for name in self.sets} | self._tasks()
        metrics = {name for data in self.parts.values() for one in data.question_sets for name in one.metrics}
        require_packages(*sorted({package for name in metrics for package in METRICS[name].packages}))
        self._check_names()
        self.rows = self._rows()
        try:
            check_rows(self.rows, args.attacks)
        except ValueError as error:
            raise ValueError(f"`attacks` can't be run: {error} Name such a set in `sets`.") from error
        self.model: Any = loaded("model", args.model, load)
        if args.adapter is not None:
            wear = partial(PeftModel.from_pretrained, self.model)
            self.model = loaded("adapter", args.adapter, wear).eval()
        self.judge = None if args.judge is None else self._judge(args.judge)
        for data in self.parts.values():
            asking = chat_or_plain(self.tokenizer, data.as_chat)
            for one in data.question_sets:
                check_lengths(ScoredModel(self.model), asking, one.pairs, f"The set {one.name!r}")
                guards = guards_of(self.model) if args.guards and one.is_guarded else []
                check_model(self.model, one.name, [*one.metrics, *guards], self.judge)
        for model in (self.model, self.judge):
            if model is not None:
                ScoredModel(model).check()

    def _require_packages(self) -> None:
        args = self.args
        needed = [
            *(METRICS[name].packages for name in (args.metrics if args.sets else ())),
            *(TASKS[name].packages for name in args.task_options),
            *(ATTACKS[name].packages for name in args.attacks),
        ]
        require_packages(*dict.fromkeys(package for packages in needed for package in packages))

    def _own_set(self, name: str) -> TaskData:
        args = self.args
        is_forget = name in (*args.forget, PARAPHRASED)
        asked = QuestionSet(name, self.sets[name], args.metrics, is_forget, is_guarded=True)
        return TaskData(asked=(asked,), settings={"files": [Path(self.files[name]).name]})

    def _tasks(self) -> dict[str, TaskData]:
        """The tasks that are asked for, by the name of their part; multiple choice one by one."""
        found: dict[str, TaskData] = {}
        for name, options in self.args.task_options.items():
            try:
                data = TASKS[name].read(self.tokenizer, **options)
            except TypeError as error:  # an argument that is unknown or missing
                raise ValueError(
                    f"`{name}` is {options}, but must hold the arguments of its reader ({error})."
                ) from error
            if isinstance(data, ChoiceData):
                found |= {f"task: {task}": one for task, one in data.each().items()}
            else:
                found[name] = data
        return found

    def _check_names(self) -> None:
        """No score of two parts has the same key."""
        owners: dict[str, str] = {}
        for part, data in self.parts.items():
            names = {one.name for one in data.question_sets}
            clash = sorted(name for name in names if name in owners)
            if clash and owners[clash[0]].startswith("set: "):
                raise ValueError(f"`sets` has {clash}, which are names of the sets of {part!r}. Choose others.")
            if clash:
                raise ValueError(f"{owners[clash[0]]!r} and {part!r} both have the sets {clash}. Measure them apart.")
            owners |= dict.fromkeys(names, part)

    def _rows(self) -> Rows:
        """What the attacks are given: the forget sets of `sets`, or that of the task; the holdout may be TOFU's."""
        args, tofu = self.args, self.parts.get("tofu")
        options = {
            name: getattr(args, name) for name in ("answered", "max_new_tokens", "batch_size", "relearning_rate")
        }
        if args.attacks and not args.forget:
            return self.attacked().attack_rows(**options)
        known = [name for name in self.sets if name not in (*args.forget, HOLDOUT, PARAPHRASED)]
        forget, retain = ([pair for name in names for pair in self.sets[name]] for names in (args.forget, known))
        holdout, settings = self.sets.get(HOLDOUT, []), {"files": self._files(args.forget)}
        if holdout:
            settings["holdout"] = self._files([HOLDOUT])
        elif tofu is not None:
            holdout, settings["holdout"] = tofu.holdout, [f"TOFU's of {tofu.settings['tofu']}"]
        return Rows(forget, retain, holdout, self.sets.get(PARAPHRASED, []), settings=settings, **options)

    def attacked(self) -> TaskData:
        """The task whose forget set is attacked where none of `sets` is."""
        parts = [(name, data) for name, data in self.parts.items() if name in TASKS and TASKS[name].is_attacked]
        found = [data for _, data in parts if data.forget]
        if len(found) != 1:
            raise ValueError(f"`attacks` is set, but {len(found)} of the tasks have questions to forget. Ask one.")
        return found[0]

    def _files(self, sets: list[str]) -> list[str]:
        return sorted(Path(self.files[name]).name for name in sets)

    def _judge(self, source: str) -> Any:
        tokenizer: PreTrainedTokenizerBase = loaded("judge", source, AutoTokenizer.from_pretrained)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"`judge` is {source!r}, which has another tokenizer than the model. Give one with that.")
        return loaded("judge", source, load)

    def run(self) -> Result:
        """Measure part by part; the result is written after each, so that what comes later can't lose it."""
        args = self.args
        name = args.name or Path(args.adapter or args.model).name
        result = Result(name, args.seed, settings=asdict(args), environment=environment())
        device = next(self.model.parameters()).device.type
        parts: dict[str, Callable[[Result], None]] = {
            **{part: partial(self._measure, data) for part, data in self.parts.items()},
            **{f"attack: {name}": partial(self._attack, name) for name in args.attacks},
        }
        left = list(parts)
        for part, measured in parts.items():
            start = time.monotonic()
            with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
                measured(result)
            result.seconds[part] = time.monotonic() - start
            left.remove(part)
            result.error = f"{STOPPED}{', '.join(left)}" if left else None
            target = None if self.target is None else self.target.scores
            result.scores.add(composites(result.scores, [oracle.scores for oracle in self.oracles], target))
            result.save(Path(args.output_file))
        return result

    def _measure(self, data: TaskData, result: Result) -> None:
        args = self.args
        options = (args.answered, args.max_new_tokens, args.batch_size, self.judge, args.guards)
        result.scores.update(measure_task(self.model, self.tokenizer, data, *options))

    def _attack(self, name: str, result: Result) -> None:
        as_chat = None if self.args.forget else self.attacked().as_chat
        found = attack(self.model, chat_or_plain(self.tokenizer, as_chat), self.rows, [name])
        result.scores.update(found.scores)
        result.skipped |= found.skipped

    def tables(self, result: Result) -> list[Table]:
        """The scores, and with oracles their distances and what takes several of them together."""
        beside = [oracle_table(result, self.oracles)] if self.oracles else []
        verdict = composite_table(result)
        return [result_table(result, self.oracles), *beside, *([] if verdict is None else [verdict])]
