# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: tables, figures, a Markdown file and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from alter_peft.evaluation.seen_tokens import SeenTokens
from alter_peft.evaluation.tables import Table, to_markdown

from .cell_table import cell_name, cell_table
from .composite_table import composite_table
from .drawing import Figure
from .figures import write_figures
from .findings import criteria_table, findings
from .main_table import main_table
from .request_table import request_tables
from .score_tables import attack_table, distance_table, guard_table, score_table
from .summary import Benchmark
from .templates import render
from .token_page import token_page


def report_tables(benchmark: Benchmark) -> list[Table]:
    """
    Criteria and the main table first, then open-unlearning's composites, requests, distances, all scores, attacks and
    guards, where there are any, and the cells.
    """
    first = (criteria_table(benchmark), main_table(benchmark), composite_table(benchmark))
    functions = (distance_table, score_table, attack_table, guard_table, cell_table)
    found = [*first, *request_tables(benchmark), *(function(benchmark) for function in functions)]
    return [table for table in found if table is not None]


def write_report(benchmark: Benchmark, found: Sequence[Table], folder: Path, command: str) -> None:
    """Write report.md, report.html and the figures (PNG) of what `report_tables` found to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_figures(benchmark, folder)
    (folder / "report.md").write_text(_markdown(benchmark, found, figures, command), encoding="utf-8")
    (folder / "report.html").write_text(page(benchmark, found, figures, command), encoding="utf-8")


def _title(benchmark: Benchmark) -> str:
    return f"Benchmark {benchmark.folder.resolve().name}"


def _markdown(benchmark: Benchmark, found: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    parts = [f"# {_title(benchmark)}", f"Made by `{command}`."]
    if lines := findings(benchmark):
        parts += ["## Findings", "\n".join(f"- {line}" for line in lines)]
    for table in found:
        parts += [f"## {table.title}", table.caption, to_markdown(table)]
    for figure in figures:
        parts += [f"## {figure.title}", figure.caption, f"![{figure.title}]({figure.path.name})"]
    return "\n\n".join(parts) + "\n"


def page(benchmark: Benchmark, tables: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    """
    The HTML page: findings, tables, figures, all settings of every cell and its error, and at the end what lies beside
    the results as `*/tokens.json` (see `token_page`), each under the name of its folder. `command` is what makes it.
    """
    cells = [cell for model in benchmark.models for cell in (*model.results, *model.failed)]
    seen = {path.parent.name: SeenTokens.load(path) for path in sorted(benchmark.folder.glob("*/tokens.json"))}
    return render(
        "page.html",
        title=_title(benchmark),
        command=command,
        findings=findings(benchmark),
        tables=tables,
        figures=[(figure, base64.b64encode(figure.path.read_bytes()).decode()) for figure in figures],
        cells=[(cell_name(cell), cell.error, json.dumps(cell.settings, indent=1, default=str)) for cell in cells],
        tokens=[(name, Markup(token_page(one))) for name, one in seen.items()],
    )
