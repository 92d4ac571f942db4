# SPDX-License-Identifier: Apache-2.0
"""What `alter-peft benchmark` is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState

from alter_peft.evaluation.arguments import MeasureArguments
from alter_peft.evaluation.tasks import TASKS
from alter_peft.options import check_counts, json_object, option, parse_values

from .methods import DEFAULT_METHODS, DESCRIBED, TEACH, VARIANT, check_methods, read_options


# What does not change the figures of a cell: methods, seeds, tasks and attacks may join a grid later
JOINABLE = {"output_dir", "methods", "seeds", "oracle_seeds", "attacks", "tasks", "limit", "form", "options"}
JOINABLE |= {"batch_size", "relearning_rate", "hazard"}  # the last is in `task_data`, too
OF_TOFU = {"data", "split", "retain_rows", "bystander_rows", "rows"}
WAIT = timedelta(days=1)  # of the other processes for the main one, which measures


@dataclass(kw_only=True)
class BenchmarkArguments(MeasureArguments):
    """A grid: every method with every seed, beside the target and the oracles."""

    output_dir: str = field(metadata={"help": "Folder of the results, one folder a cell inside."})
    data: str = option("locuslab/TOFU", "Folder of TOFU's JSON lines, or a Hub data set.")
    requests: int | None = option(None, "Split the forget set into so many requests.")
    methods: list[str] = option(list(DEFAULT_METHODS), DESCRIBED)
    seeds: list[int] = option([0], "Seeds of the methods.")
    oracle_seeds: list[int] = option([0, 1, 2], "Seeds of the oracles.")
    options: dict[str, Any] | str | None = option(None, 'Method, or "teach" -> training options, as JSON.')
    target: str | None = option(None, "A model that was taught the data already.")

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            self.options = json_object("options", self.options)
        self.options = {} if self.options is None else self.options
        if not (isinstance(self.options, dict) and all(isinstance(own, dict) for own in self.options.values())):
            raise ValueError(f"`options` is {self.options!r}, but must be method -> {{option: value}}.")
        others = {name: value for name, value in vars(self).items() if name != "options"}
        for name, value in parse_values(BenchmarkArguments, others).items():
            setattr(self, name, value)
        super().__post_init__()
        check_counts(requests=self.requests)
        check_methods("methods", self.methods)
        check_methods("options", [name for name in self.options if name != TEACH])
        if unknown := [name for name in self.methods if VARIANT in name and name not in self.options]:
            raise ValueError(
                f"`methods` has {unknown}, of which `options` says nothing, so that it would be "
                f"{unknown[0].partition(VARIANT)[0]!r} by its defaults under another name. Give its options."
            )
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
        self._check_task()

    def _check_task(self) -> None:
        """One task, with nothing set that is of another one."""
        given = [name for name in ("books", "task_data") if getattr(self, name) is not None]
        given = ["hazard" if name == "task_data" and self.hazard else name for name in given]
        if len(given) > 1 or (self.task_data is not None and len(self.task_data) != 1):
            raise ValueError(f"`task_data` is {self.task_data}, but a grid is of one task. Give one, and no `books`.")
        of_tofu = self.set_of_tofu("data", "requests")
        if given and of_tofu:
            raise ValueError(f"`{of_tofu[0]}` is set, but it is of TOFU alone. Remove it or `{given[0]}`.")
        if self.attacks and (self.requests is not None or not TASKS[self.task[0]].is_attacked):
            one = "requests" if self.requests is not None else given[0]
            raise ValueError(f"`attacks` is set, but they are for questions forgotten at once. Remove it or `{one}`.")

    @property
    def task(self) -> tuple[str, dict[str, Any]]:
        """The name in `TASKS` of what is to be forgotten, and arguments of its reader."""
        if self.other_tasks:
            return next(iter(self.other_tasks.items()))
        if isinstance(self.books, dict):
            return "books", self.books
        return "tofu", self.tofu_options(self.data)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures of a cell depend on, by field; of other tasks than the grid's nothing."""
        other = OF_TOFU if self.books or self.task_data else {"books", "task_data"}
        return {name: value for name, value in asdict(self).items() if name not in JOINABLE | other}
