# SPDX-License-Identifier: Apache-2.0
"""`alter-peft benchmark`: runs a grid and writes its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.cli import DONE, FAILED
from alter_peft.evaluation.tables import to_markdown
from alter_peft.options import require_packages
from alter_peft.report.reading import read_benchmark, read_cells
from alter_peft.report.report import report_tables
from alter_peft.report.score_tables import error_text, score_table
from alter_peft.words import counted

from .parser import OptionParser, Section, read_config
from .report import write_and_print


SECTIONS = (
    Section("what is compared", "", ["model", "methods", "seeds", "oracle_seeds", "target", "options", "output_dir"]),
    Section(
        "what is forgotten",
        "TOFU, or else books, the hazard, or a task.",
        [
            "data",
            "split",
            "retain_rows",
            "bystander_rows",
            "rows",
            "requests",
            "books",
            "hazard",
            "task_data",
            "tasks",
            "limit",
            "form",
        ],
    ),
    Section(
        "how it is measured",
        "",
        ["answered", "max_new_tokens", "batch_size", "chat_template_kwargs", "attacks", "relearning_rate"],
    ),
)


def benchmark(argv: Sequence[str]) -> Callable[[], int | None]:
    """What runs a grid, as far as it isn't there yet, and writes its report."""
    words, config = read_config(argv)
    parser = OptionParser(
        (BenchmarkArguments,),
        sections=SECTIONS,
        prog="alter-peft benchmark",
        usage="alter-peft benchmark [--config grid.yaml] --model M --output_dir DIR [options]",
        description="Teach a model, make it forget by several methods, and measure all beside models that never saw "
        "what was to be forgotten. A run that stopped is taken up by the same command.",
    )
    (args,) = parser.parse(words, config)
    require_packages("matplotlib")
    with parser.in_flags():
        grid = Grid(args)

    def run() -> int:
        try:
            results = grid.run()
        except BlockingIOError as error:  # another run is at work there
            print(f"alter-peft benchmark: error: {error}", file=sys.stderr)
            return FAILED
        if not PartialState().is_main_process:
            return DONE
        failed = [result for result in results if result.error is not None]
        if failed:
            reasons = "; ".join(f"{one.name} of seed {one.seed}: {error_text(one)}" for one in failed)
            print(f"{len(failed)} of {counted(len(results), 'cell')} failed: {reasons}", file=sys.stderr)
        compared = _report(Path(args.output_dir), shlex.join(["alter-peft", "benchmark", *argv]))
        return FAILED if failed or not compared else DONE

    return run


def _report(folder: Path, command: str) -> bool:
    """Whether there is a report; where cells cannot be compared, the scores are printed as they are."""
    try:
        cells = read_cells(folder)
    except ValueError as error:  # of a file that is no result, or a second one of a cell
        print(f"alter-peft benchmark: error: {error}", file=sys.stderr)
        return False
    try:
        found = read_benchmark(folder)
    except ValueError as error:
        print(to_markdown(score_table(cells)), end="\n\n")
        print(f"There are no distances and no report: {error}", file=sys.stderr)
        return False
    write_and_print(found, report_tables(found), folder, command)
    return True
