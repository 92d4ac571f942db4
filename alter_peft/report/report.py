# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: tables, figures, a Markdown file and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alter_peft.evaluation.tables import Table, to_markdown

from .cell_table import cell_table
from .distance_table import distance_table
from .drawing import Figure
from .figures import write_figures
from .main_table import main_table
from .model_tables import attack_table, guard_table, score_table
from .page import page
from .request_table import request_tables
from .summary import Benchmark


def report_tables(benchmark: Benchmark) -> list[Table]:
    """The main table first, requests, distances, all scores, attacks and guards where there are any, and the cells."""
    functions = (distance_table, score_table, attack_table, guard_table, cell_table)
    found = (function(benchmark) for function in functions)
    return [main_table(benchmark), *request_tables(benchmark), *(table for table in found if table is not None)]


def write_report(benchmark: Benchmark, found: Sequence[Table], folder: Path, command: str) -> None:
    """
    Write report.md, report.html and the figures (PNG) to a folder.

    Args:
        found: what `report_tables` makes of the benchmark.
        command: what makes the report, for its reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_figures(benchmark, folder)
    (folder / "report.md").write_text(_markdown(benchmark, found, figures, command), encoding="utf-8")
    (folder / "report.html").write_text(page(benchmark, found, figures, command), encoding="utf-8")


def _markdown(benchmark: Benchmark, found: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    parts = [f"# Benchmark {benchmark.folder.resolve().name}", f"Made by `{command}`."]
    for table in found:
        parts += [f"## {table.title}", table.caption, to_markdown(table)]
    for figure in figures:
        parts += [f"## {figure.title}", figure.caption, f"![{figure.title}]({figure.path.name})"]
    return "\n\n".join(parts) + "\n"
