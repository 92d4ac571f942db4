# SPDX-License-Identifier: Apache-2.0
"""`alter-peft report`: draws what a benchmark measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from alter_peft.evaluation.tables import Table, to_markdown
from alter_peft.options import require_packages
from alter_peft.report.findings import findings
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import report_tables, write_report
from alter_peft.report.summary import Benchmark

from .parser import CommandParser


def report(argv: Sequence[str]) -> Callable[[], None]:
    """What writes a benchmark's tables, figures and page, and prints its findings and its main table."""
    parser = CommandParser(
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
        raise ValueError(f"`--output_dir` is '{output}', but that is a file. Give a folder.")
    return lambda: write_and_print(found, tables, output, shlex.join(["alter-peft", "report", *argv]))


def write_and_print(found: Benchmark, tables: list[Table], output: Path, command: str) -> None:
    """The report of a benchmark in folder `output`; its findings, criteria and main table on the terminal."""
    write_report(found, tables, output, command)
    print(*(f"- {line}" for line in findings(found)), sep="\n", end="\n\n")
    for table in (table for table in tables if table.title in ("Criteria", "Forgetting and utility")):
        print(to_markdown(table), end="\n\n")
    print(f"report: {output / 'report.html'}")
