# SPDX-License-Identifier: Apache-2.0
"""`alter-peft evaluate`: measures one model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from alter_peft.evaluation.arguments import EvaluateArguments
from alter_peft.evaluation.evaluate import Evaluation
from alter_peft.evaluation.tables import to_markdown

from .parser import OptionParser, Section, read_config


SECTIONS = (
    Section("the model", "", ["model", "adapter", "as_chat", "chat_template_kwargs", "bf16"]),
    Section(
        "what is asked",
        "At least one of sets, tofu, books, hazard, tasks and task_data.",
        [
            "sets",
            "columns",
            "forget",
            "metrics",
            "tofu",
            "split",
            "retain_rows",
            "bystander_rows",
            "rows",
            "books",
            "hazard",
            "tasks",
            "limit",
            "form",
            "task_data",
        ],
    ),
    Section("how it answers", "", ["answered", "max_new_tokens", "batch_size"]),
    Section("attacks and guards", "", ["attacks", "relearning_rate", "guards", "judge"]),
    Section("what is written, and compared", "", ["output_file", "name", "seed", "oracles", "target"]),
)


MEANS = (
    "probability: arithmetic mean over rows, as TOFU's; `alter-peft unlearn` prints the geometric mean, in which its "
    "level is given."
)


def evaluate(argv: Sequence[str]) -> Callable[[], int | None]:
    """What measures one model, and prints its scores."""
    argv, config = read_config(argv)
    parser = OptionParser(
        (EvaluateArguments,),
        sections=SECTIONS,
        prog="alter-peft evaluate",
        usage="alter-peft evaluate [--config options.yaml] --model M [--adapter A] --output_file F [options]",
        description="Measure a model, with or without an adapter.",
    )
    (args,) = parser.parse(argv, config)
    with parser.in_flags():
        evaluation = Evaluation(args)
    if evaluation.taken:
        print(*evaluation.taken, sep="\n", file=sys.stderr)
    if evaluation.merge is not None:
        print(f"`--model` {evaluation.merge}")

    def run() -> None:
        with parser.in_flags():
            result = evaluation.run()
        for table in evaluation.tables(result):
            print(to_markdown(table) if table.rows else "\n".join(table.notes), end="\n\n")
        if any(key.metric == "probability" for key in result.scores):
            print(MEANS, end="\n\n")
        for attack, reason in result.skipped.items():
            print(f"{attack} was left out: {reason}")
        print(f"scores: {args.output_file}")

    return run
