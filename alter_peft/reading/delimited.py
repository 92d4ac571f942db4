# SPDX-License-Identifier: Apache-2.0
"""CSV and TSV, as text: the delimiter is found by content, and every cell is what stands in the file."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from alter_peft.words import counted

from .texts import TextFile


DELIMITERS = ",;\t|"
NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SAMPLE = 50  # rows that tell the delimiter
Record = tuple[int, list[str]]  # the line that a row begins with, and its cells


class Form(NamedTuple):
    """
    How a table is written.

    delimiter: what stands between two cells.
    skips: whether blanks after it are none of the text, as in `question, answer` and in `"Who?", "Ann, of Ulm"`.
    """

    delimiter: str
    skips: bool = False


def form_of(file: TextFile, default: str = ",") -> Form:
    """
    How a table is written, by its first line, and by quotes after a blank wherever they are: they quote nothing unless
    the blank is skipped.
    """
    delimiter = _delimiter_of(file, default)
    quoted = re.compile(rf'{re.escape(delimiter)} +"[^"\r\n{re.escape(delimiter)}]')
    try:
        names = next((cells for _, cells in _records(file, Form(delimiter))), [])
    except csv.Error:
        return Form(delimiter)  # what is wrong with the first line, `names_of` says
    if len(names) > 1 and all(name.startswith(" ") for name in names[1:]):
        return Form(delimiter, True)
    with file.open() as text:
        return Form(delimiter, any(quoted.search(line) for line in text))


def _delimiter_of(file: TextFile, default: str) -> str:
    """The delimiter by which the first line has several names, and most of the rows after it as many cells."""
    best, score = default, 0.0
    for delimiter in sorted(DELIMITERS, key=lambda one: one != default):
        try:
            rows = [cells for _, cells in islice(_records(file, Form(delimiter)), SAMPLE)]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1:
            same = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            if same > score:
                best, score = delimiter, same
    return best


def _records(file: TextFile, form: Form) -> Iterator[Record]:
    """The rows that are not blank, without Excel's line `sep=`."""
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # a cell may be a document
    with file.open(newline="") as text:
        reader = csv.reader(text, delimiter=form.delimiter, skipinitialspace=form.skips, strict=True)
        line = 1
        for cells in reader:
            if any(cell.strip() for cell in cells) and not (line == 1 and cells[0].lower().startswith("sep=")):
                yield line, cells
            line = reader.line_num + 1


def names_of(file: TextFile, form: Form) -> list[str]:
    """
    What the first line names; a column without a name is called after its number.

    Raises:
        ValueError: there are no names; the message goes on after the file's name.
    """
    try:
        cells = next((cells for _, cells in _records(file, form)), None)
    except csv.Error as error:
        raise ValueError(
            f"whose first line names no columns ({error}). End every quoted name, with the "
            f"{NAMES[form.delimiter]} right after its last quote"
        ) from error
    if cells is None:
        raise ValueError("which has no line with the names of the columns. Give one")
    return [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]


def header_of(file: TextFile, form: Form) -> list[str]:
    """
    The names of the columns.

    Raises:
        ValueError: as of `names_of`, or two have the same name.
    """
    names = names_of(file, form)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"whose first line names the column {twice[0]!r} twice. Rename one")
    return names


def table_rows(file: TextFile, form: Form) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Each row after the first, as a dict of texts, and the line that it begins with.

    Raises:
        ValueError: a row has more or fewer cells than there are columns, or quotes that do not end.
    """
    names, mark = header_of(file, form), NAMES[form.delimiter]
    line = 1
    try:
        for line, cells in islice(_records(file, form), 1, None):
            extra = cells[len(names) :]
            if len(cells) < len(names) or any(cell.strip() for cell in extra):
                raise ValueError(
                    f"whose line {line} has {counted(len(cells), 'cell')} by the {mark}, but the first line has "
                    f"{counted(len(names), 'name')}. Put a text that holds a {mark} into double quotes"
                )
            yield f"line {line}", dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise ValueError(
            f"whose row after line {line} is no row of CSV ({error}). End every quoted text, and double quotes inside"
        ) from error
