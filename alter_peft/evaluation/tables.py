# SPDX-License-Identifier: Apache-2.0
"""A table with footnotes, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass
class Table:
    """
    What a report says in rows.

    title, caption: what it is, and how it is to be read.
    columns: their names, that of the row names first.
    rows: a name and a cell for each other column; one that is shorter ends in a sentence that takes the rest.
    notes: footnotes, to which cells point by `mark`.
    """

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def mark(self, note: str) -> str:
        """The mark of a footnote, `"[1]"`, which is added if it is new."""
        if note not in self.notes:
            self.notes.append(note)
        return f"[{self.notes.index(note) + 1}]"


def to_markdown(table: Table) -> str:
    """The rows of a table and its notes; title and caption are for the page around it."""
    padded = [[*row, *[""] * (len(table.columns) - len(row))] for row in table.rows]
    lines = [_markdown_row(table.columns), "|---" * len(table.columns) + "|", *map(_markdown_row, padded)]
    for number, note in enumerate(table.notes, 1):
        lines += ["", f"[{number}] {note}"]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_html(table: Table) -> str:
    """A section with the title, the caption, the rows and the notes."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    lines = ["<section>", f"<h2>{escape(table.title)}</h2>", f"<p>{escape(table.caption)}</p>"]
    lines += ['<div class="wide"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for name, *cells in table.rows:
        found = [f"<td>{escape(cell)}</td>" for cell in cells]
        missing = len(table.columns) - 1 - len(cells)
        if missing:
            found[-1] = f'<td class="sentence" colspan="{missing + 1}">{escape(cells[-1])}</td>'
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(found)}</tr>')
    lines.append("</tbody></table></div>")
    lines += [f'<p class="note">[{number}] {escape(note)}</p>' for number, note in enumerate(table.notes, 1)]
    return "\n".join([*lines, "</section>"])
