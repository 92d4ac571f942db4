# SPDX-License-Identifier: Apache-2.0
"""A grid of models on one benchmark: target, oracles and methods, a folder each; it resumes where it stopped."""

from __future__ import annotations

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer

from alter_peft.chat import chat_or_plain
from alter_peft.evaluation.attacks import ATTACKS, check_rows
from alter_peft.evaluation.loading import loaded
from alter_peft.evaluation.metrics import METRICS
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tasks import TASKS
from alter_peft.evaluation.tasks.choices import read_choices
from alter_peft.options import require_packages

from .arguments import BenchmarkArguments
from .cell import Cell
from .setting import read_setting


class Grid:
    """
    A benchmark that is ready to run: its data are read, and what is there already is of the same settings.

    Raises:
        ValueError: unusable data or model, or results of other settings in `output_dir`.
    """

    def __init__(self, args: BenchmarkArguments) -> None:
        source = ("target", args.target) if args.target else ("model", args.model)
        loaded(*source, AutoConfig.from_pretrained)
        tokenizer = chat_or_plain(loaded(*source, AutoTokenizer.from_pretrained), None, args.template_kwargs)
        packages = [*TASKS[args.task[0]].packages, *(name for one in args.attacks for name in ATTACKS[one].packages)]
        require_packages(*dict.fromkeys(packages), *(["lm_eval"] if args.tasks else []))
        if args.tasks:
            read_choices(args.tasks, args.limit, args.form)
        setting = read_setting(args, tokenizer)
        metrics = {name for one in setting.data.question_sets for name in one.metrics}
        require_packages(*sorted({package for name in metrics for package in METRICS[name].packages}))
        try:
            check_rows(setting.rows, args.attacks)
        except ValueError as error:
            raise ValueError(f"`attacks` can't be run on {args.task[0]}: {error}") from error
        settings = {**args.settings, "processes": PartialState().num_processes}  # batches are of each process
        if "bystander_rows" in settings:  # how many there are; grids from before there were any say nothing of them
            settings["bystander_rows"] = len(setting.data.bystanders) or None
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
