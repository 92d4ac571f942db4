# SPDX-License-Identifier: Apache-2.0
"""One model of a grid: taught or unlearned, measured, asked tasks and attacked, as far as it isn't done yet."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, logging
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft.chat import chat_or_plain
from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.attacks import attack
from alter_peft.evaluation.loading import load
from alter_peft.evaluation.open_unlearning import composites
from alter_peft.evaluation.results import ORACLE, STOPPED, TARGET, Result, environment, machine
from alter_peft.evaluation.scores import Score, Scores
from alter_peft.evaluation.seen_tokens import observe_tokens
from alter_peft.evaluation.tasks import measure_task
from alter_peft.evaluation.tasks.choices import read_choices
from alter_peft.scoring import ScoredModel
from alter_peft.trainer import UnlearnConfig

from .arguments import BenchmarkArguments
from .folder_lock import folder_lock
from .methods import TEACH, method_named, trained
from .provenance import CONTENT, OF_TEACHING, RECORD, TAUGHT_WITH, check_made_with, corrected
from .requests import Requests, run_requests, scores_after
from .setting import Setting
from .teaching import teach


logger = logging.get_logger(__name__)
SEEN = "seen tokens"  # a part of a cell, as tasks and attacks are


class Cell:
    """
    One model of the grid, in a folder of its own.

    Args:
        settings: of the whole grid; a cell adds its method's options and, as `"teach"`, those that the target was
            taught with.
        name: `"target"`, `"oracle"`, a name of `METHODS` or a variant of one.

    Raises:
        ValueError: the folder has a result of other settings, unless it failed and these are options.
    """

    def __init__(
        self,
        args: BenchmarkArguments,
        setting: Setting,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        name: str,
        seed: int,
    ) -> None:
        assert isinstance(args.options, dict)
        self.args, self.setting, self.tokenizer, self.name, self.seed = args, setting, tokenizer, name, seed
        out = Path(args.output_dir)
        self.target = Path(args.target) if args.target else out / TARGET / "model"
        self.folder = out / (TARGET if name == TARGET else f"{name}-{seed}")
        self.path, self.seen = self.folder / "result.json", self.folder / "tokens.json"
        self.teaches = name == ORACLE or (name == TARGET and not args.target)
        self.options = args.options.get(TEACH if name in (TARGET, ORACLE) else name, {})
        content = setting.content
        self.settings = {**settings, "options": self.options, CONTENT: content}
        if name not in (TARGET, ORACLE):
            if "forget_loss" not in {**method_named(name).options, **self.options}:
                self.settings["forget_loss"] = UnlearnConfig.forget_loss  # the default, which other versions have had
            if not args.target:
                self.settings[TEACH] = args.options.get(TEACH, {})
        taught = {name: value for name, value in content.items() if name in OF_TEACHING}
        self.record = {"seed": seed, **{key: self.settings.get(key) for key in TAUGHT_WITH}, CONTENT: taught}
        self.choices: dict[str, Any] = {"limit": args.limit, "form": args.form}
        self._check()

    def _check(self) -> None:
        changed: set[str] = set()
        if self.path.is_file():
            result = Result.load(self.path)
            changed = corrected(result, self.settings)
            tasks = {name: self.choices for name in self.args.tasks if name in result.settings.get("tasks", {})}
            settings = {key: value for key, value in self.settings.items() if key not in changed}
            if "relearning" in self.args.attacks and "attack: relearning" in result.seconds:
                settings["relearning_rate"] = self.args.relearning_rate
            check_made_with(self.name, self.path, result.settings, settings)
            check_made_with(self.name, self.path, result.settings.get("tasks", {}), tasks)
        record = self.folder / "model" / RECORD
        if self.teaches and record.is_file() and not changed:
            check_made_with(self.name, record, json.loads(record.read_text()), self.record)

    def run(self) -> Result:
        """
        What is missing of the cell: training, scores, tasks, attacks.

        Raises:
            BlockingIOError: another run is at work on this cell.
        """
        result = self._usable(self._found())
        if result.error is None and not self._left(result):
            return result
        with folder_lock(self.folder):
            return self._complete()

    def _complete(self) -> Result:
        self._check()  # another run may have been here
        found = self._found()
        result = self._usable(found)
        PartialState().wait_for_everyone()  # for those that still read
        left = self._left(result)
        if result.error is None and not left:
            return result
        print(f"{self.folder.name}: {', '.join(left)}", flush=True)
        if self.teaches and corrected(found, self.settings):
            self._remove_model()
        if result.is_measured:
            self._save(result)
        errors: list[str] = []
        if not result.environment:
            result.environment, result.machine = environment(), machine()
        set_seed(self.seed)
        together = PartialState().num_processes > 1  # the others are then within a step, and wait for this process
        model = self._model(result) if together else self._tried(result, errors, lambda: self._model(result))
        if model is not None and PartialState().is_main_process:
            if not result.is_measured:
                self._tried(result, errors, lambda: self._evaluate(result, model))
            for part in self._parts_left(result) if result.is_measured else []:
                self._tried(result, errors, lambda part=part: self._add(result, model, part))  # type: ignore[misc]
        if broken := result.broken:
            errors.append(f"`{broken[0]}` is {result.scores[broken[0]].value}, or one of its rows is no finite number")
        result.error = "; ".join(errors) or None
        if PartialState().is_main_process:
            result.save(self.path)
        PartialState().wait_for_everyone()
        return result

    def _found(self) -> Result:
        return Result.load(self.path) if self.path.is_file() else Result(self.name, self.seed)

    def _usable(self, found: Result) -> Result:
        """What is kept of an earlier result."""
        result = Result(self.name, self.seed) if corrected(found, self.settings) else found
        result.settings = {**result.settings, **self.settings}
        if result.broken:  # all is measured anew; requests are made anew if a score of theirs is broken
            whole = all(score.is_finite for score in result.scores.after_requests.values())
            result.seconds = {name: value for name, value in result.seconds.items() if whole and name == "training"}
            result.scores, result.skipped = result.scores.after_requests if whole else Scores(), {}
        return result

    def _left(self, result: Result) -> list[str]:
        """What is still to be done, as the reader of a result is told."""
        if result.is_measured:
            return self._parts_left(result)
        training = [] if "training" in result.seconds or (self.name == TARGET and self.args.target) else ["training"]
        if self.setting.requests is not None and self.name not in (TARGET, ORACLE):
            first, last = max(Requests(result.scores.after_requests).made, 0) + 1, len(self.setting.requests)
            training = [f"requests {first} to {last}"] if first <= last else []
        return [*training, "evaluation", *self._parts_left(result)]

    def _parts_left(self, result: Result) -> list[str]:
        """What the router saw where tokens are routed, tasks and attacks."""
        routed = any(key.metric == "astray" for key in result.scores)
        seen = [SEEN] if routed and not self.seen.is_file() else []
        wanted = [f"task: {name}" for name in self.args.tasks] + [f"attack: {name}" for name in self.args.attacks]
        return [*seen, *(part for part in wanted if part not in result.seconds)]

    def _remove_model(self) -> None:
        if PartialState().is_main_process:
            shutil.rmtree(self.folder / "model", ignore_errors=True)
        PartialState().wait_for_everyone()

    def _tried(self, result: Result, errors: list[str], part: Callable[[], Any]) -> Any:
        """What the part gives; a failure is noted, so that others may do, unless it leaves nothing to compare with."""
        try:
            return part()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            if self.name == TARGET and not (self.path.is_file() and Result.load(self.path).is_measured):
                result.error = errors[-1]
                if PartialState().is_main_process:
                    result.save(self.path)
                raise
            logger.warning(f"A part of {self.folder.name} failed.", exc_info=True)

    def _save(self, result: Result) -> None:
        """What is there so far; if this run is stopped, it says what is not."""
        left = ", ".join(self._left(result))
        result.error = f"{STOPPED}{left}" if left else None
        if PartialState().is_main_process:
            result.save(self.path)

    def _model(self, result: Result) -> Any:
        """The trained model, from the folder if it is there."""
        if self.name == TARGET and self.args.target:
            return load(self.target)
        if self.name in (TARGET, ORACLE):
            return self._taught(result)
        if self.setting.requests is not None:
            return self._after_requests(result, self.setting.requests)
        if "training" not in result.seconds:
            with _timing(result, "training"):
                method_named(self.name).run(
                    load(self.target), self.tokenizer, self.setting.given, self.folder, self.seed, self.options
                )
            self._trained(result)
            PartialState().wait_for_everyone()  # for the main one, which saves
        # as it was saved, in this run as in a later one, and without the wrappers of the training
        return trained(self.target, self.folder)

    def _taught(self, result: Result) -> PreTrainedModel:
        place = self.folder / "model"
        if (place / "config.json").is_file():
            return load(place)
        rows = self.setting.taught if self.name == TARGET else self.setting.taught_to_oracles
        with _timing(result, "training"):
            chat = self.setting.data.as_chat
            model = teach(
                load(self.args.model), self.tokenizer, rows, place, self.seed, self.record, chat, **self.options
            )
        self._trained(result)
        return model

    def _after_requests(self, result: Result, requests: list[list[Pair]]) -> PreTrainedModel | PeftModel:
        data, given = self.setting.data, self.setting.given

        # around the passes alone: within, optimiser steps would not be seen
        def measured(current: Any, made: int) -> list[Score]:
            with _precision():
                return scores_after(current, self.tokenizer, data, requests, made, self.args.batch_size)

        def save(done: Requests) -> None:
            result.seconds["training"] = done.seconds
            result.scores.update(done.scores)
            known, here = result.machines.get("training"), machine()
            result.machines["training"] = here if known is None else known if here in known else f"{known}, {here}"
            self._trained(result)

        before = Requests(result.scores.after_requests, result.seconds.get("training", 0.0))
        return run_requests(
            method_named(self.name), load(self.target), self.tokenizer, list(map(data.training_rows, requests)), given,
            measured, self.folder, self.seed, self.options, before, save,
        )[0]  # fmt: skip

    def _trained(self, result: Result) -> None:
        result.machine, result.environment = machine(), environment()
        self._save(result)

    def _evaluate(self, result: Result, model: Any) -> None:
        with _timing(result, "evaluation"), _precision():
            ScoredModel(model).check()
            judge = model if self.name == TARGET else load(self.target) if self.name == ORACLE else None
            guards = self.setting.requests is None  # of several adapters none is astray by itself
            options = (self.args.answered, self.args.max_new_tokens, self.args.batch_size, judge, guards)
            result.scores.update(measure_task(model, self.tokenizer, self.setting.data, *options))
        result.scores.add(composites(result.scores))  # the report has those that need other models
        self.seen.unlink(missing_ok=True)  # of what was measured before
        self._save(result)

    def _observe(self, model: Any) -> None:
        data = self.setting.data
        with _precision():
            tokenizer = chat_or_plain(self.tokenizer, data.as_chat)
            sets = {"forget": self.setting.rows.forget, **data.kept_sets, **data.bystander_sets}
            found = observe_tokens(model, tokenizer, sets)
        found.save(self.seen)

    def _add(self, result: Result, model: Any, part: str) -> None:
        """One task or attack, or what the router saw."""
        if part == SEEN:
            self._observe(model)
            return self._save(result)
        kind, _, name = part.partition(": ")
        with _timing(result, part), _precision():
            if kind == "task":
                asked = read_choices([name], **self.choices)
                result.scores.update(measure_task(model, self.tokenizer, asked, batch_size=self.args.batch_size))
                result.settings["tasks"] = {**result.settings.get("tasks", {}), name: self.choices}
            else:
                tokenizer = chat_or_plain(self.tokenizer, self.setting.data.as_chat)
                found = attack(model, tokenizer, self.setting.rows, [name])
                result.scores.update(found.scores)
                result.skipped |= found.skipped
                if name == "relearning":
                    result.settings["relearning_rate"] = self.args.relearning_rate
        self._save(result)


@contextmanager
def _timing(result: Result, part: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    result.seconds[part], result.machines[part] = time.monotonic() - start, machine()


@contextmanager
def _precision() -> Iterator[None]:
    """bfloat16 autocast, in which all of a grid is measured."""
    device = PartialState().device.type
    with torch.autocast(device, torch.bfloat16):
        yield
