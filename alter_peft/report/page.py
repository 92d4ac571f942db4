# SPDX-License-Identifier: Apache-2.0
"""One HTML page of a benchmark that needs no other file: tables, figures, cells with their settings, token pages."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tables import Table, to_html

from .cell_table import cell_name, settings_of
from .drawing import Figure
from .summary import Benchmark


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1c1c; --line: #d4d4d4; --faint: #606060; --band: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --text: #e4e4e4; --line: #3a3d44; --faint: #a4a8b0; --band: #20232a }
}
body { background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td.sentence { text-align: left }
th:first-child { white-space: nowrap }
td.sentence { color: var(--faint) }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom }
tbody tr:nth-child(even) { background: var(--band) }
figure { margin: 1rem 0 }
figure img { max-width: 100%; width: 47rem; background: #fff; border-radius: .4rem; padding: .5rem;
             box-sizing: border-box }
figcaption, .note { color: var(--faint); font-size: .875rem }
.note { margin: .2rem 0 }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
details { border-bottom: 1px solid var(--line); padding: .3rem 0 }
"""


def page(benchmark: Benchmark, tables: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    """
    The whole page. Fragments that lie beside the results, `*/tokens.html` (see `token_page`), stand at its end, each
    under the name of its folder.

    Args:
        command: what makes the page.
    """
    title = f"Benchmark {benchmark.folder.resolve().name}"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>\n<p>Made by <code>{escape(command)}</code>.</p>",
        *map(to_html, tables),
        *map(_figure, figures),
        _settings(benchmark),
        *map(_tokens, sorted(benchmark.folder.glob("*/tokens.html"))),
    ]
    return "\n".join([*parts, "</body>\n</html>\n"])


def _figure(figure: Figure) -> str:
    image = base64.b64encode(figure.path.read_bytes()).decode()
    return (
        f'<section>\n<h2>{escape(figure.title)}</h2>\n<figure><img alt="{escape(figure.title)}" '
        f'src="data:image/png;base64,{image}">\n<figcaption>{escape(figure.caption)}</figcaption></figure>\n</section>'
    )


def _settings(benchmark: Benchmark) -> str:
    """All settings of every cell, and its error."""
    cells = [cell for model in benchmark.models for cell in (*model.results, *model.failed)]
    return "\n".join(["<section>", "<h2>Settings of each cell</h2>", *map(_cell, cells), "</section>"])


def _cell(cell: Result) -> str:
    text = json.dumps(settings_of(cell), indent=1, default=str)
    if cell.error is not None:
        text = f"{cell.error}\n\n{text}"
    return f"<details><summary>{escape(cell_name(cell))}</summary><pre>{escape(text)}</pre></details>"


def _tokens(path: Path) -> str:
    fragment = path.read_text(encoding="utf-8")
    return f"<section>\n<h2>Tokens of {escape(path.parent.name)}</h2>\n{fragment}\n</section>"
