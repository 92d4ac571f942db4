# SPDX-License-Identifier: Apache-2.0
"""`alter-peft evaluate`: measures one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl.scripts.utils import TrlParser

from alter_peft.evaluation.arguments import EvaluateArguments
from alter_peft.evaluation.evaluate import Evaluation
from alter_peft.evaluation.tables import to_markdown


def evaluate(argv: Sequence[str]) -> Callable[[], None]:
    """What measures one model, and prints its scores."""
    parser = TrlParser(
        (EvaluateArguments,),  # type: ignore[arg-type]
        prog="alter-peft evaluate",
        usage="alter-peft evaluate [--config options.yaml] --model M [--adapter A] --output_file F [options]",
        description="Measure a model, with or without an adapter. Every option may also stand in a YAML file.",
    )
    (args,) = parser.parse_args_and_config(list(argv))
    evaluation = Evaluation(args)

    def run() -> None:
        result = evaluation.run()
        for table in evaluation.tables(result):
            print(to_markdown(table) if table.rows else "\n".join(table.notes), end="\n\n")
        for attack, reason in result.skipped.items():
            print(f"{attack} was left out: {reason}")
        print(f"scores: {args.output_file}")

    return run
