# SPDX-License-Identifier: Apache-2.0
"""The commands of the evaluation: each checks what it is given and returns what is then to be run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from trl.scripts.utils import TrlParser

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.evaluation.arguments import EvaluateArguments
from alter_peft.evaluation.evaluate import Evaluation
from alter_peft.evaluation.tables import Table, to_markdown
from alter_peft.options import require_packages
from alter_peft.report.reading import read_benchmark, read_cells
from alter_peft.report.report import report_tables, write_report
from alter_peft.report.score_tables import error_text, score_table
from alter_peft.report.summary import Benchmark


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


def benchmark(argv: Sequence[str]) -> Callable[[], None]:
    """What runs a grid, as far as it isn't there yet, and writes its report."""
    parser = TrlParser(
        (BenchmarkArguments,),  # type: ignore[arg-type]
        prog="alter-peft benchmark",
        usage="alter-peft benchmark [--config grid.yaml] --model M --output_dir DIR [options]",
        description="Teach a model, make it forget by several methods, and measure all beside models that never saw "
        "what was to be forgotten. A run that stopped is taken up by the same command.",
    )
    (args,) = parser.parse_args_and_config(list(argv))
    require_packages("matplotlib")
    grid = Grid(args)

    def run() -> None:
        try:
            results = grid.run()
        except BlockingIOError as error:  # another run is at work there
            print(f"alter-peft benchmark: error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if not PartialState().is_main_process:
            return
        failed = [result for result in results if result.error is not None]
        if failed:
            reasons = "; ".join(f"{one.name} of seed {one.seed}: {error_text(one)}" for one in failed)
            print(f"{len(failed)} of {len(results)} cells failed: {reasons}", file=sys.stderr)
        compared = _report(Path(args.output_dir), shlex.join(["alter-peft", "benchmark", *argv]))
        if failed or not compared:
            raise SystemExit(1)

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
    _write(found, report_tables(found), folder, command)
    return True


def report(argv: Sequence[str]) -> Callable[[], None]:
    """What writes a benchmark's tables, figures and page, and prints its main table."""
    parser = argparse.ArgumentParser(
        prog="alter-peft report",
        description="Tables, figures and one self-contained HTML page from the results of a benchmark.",
    )
    parser.add_argument("folder", type=Path, help="folder of the benchmark, with */result.json")
    parser.add_argument("--output_dir", type=Path, help="where report.md, report.html and *.png go (default: folder)")
    args = parser.parse_args(argv)
    require_packages("matplotlib")
    found = read_benchmark(args.folder)
    tables = report_tables(found)
    output: Path = args.output_dir or args.folder
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output_dir` is '{output}', but that is a file. Give a folder.")
    return lambda: _write(found, tables, output, shlex.join(["alter-peft", "report", *argv]))


def _write(found: Benchmark, tables: list[Table], output: Path, command: str) -> None:
    write_report(found, tables, output, command)
    print(to_markdown(tables[0]))
    print(f"\nreport: {output / 'report.html'}")
