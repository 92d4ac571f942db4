# SPDX-License-Identifier: Apache-2.0
"""Files -> the rows in them as they came, one after another; what a file is, is found by its content and its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet

from . import delimited, json_rows
from .columns import Ambiguous, Unrecognised, choose
from .passages import passages
from .texts import TextFile, first_bytes, open_binary, text_file
from .values import is_blank, shown


# Suffix, without that of a compression -> kind. Content comes first: JSON lines may be called .json, and so on.
SUFFIXES = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".tab": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "document", ".text": "document", ".md": "document",
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz")
OFFERED = ".jsonl, .json, .csv, .tsv, .parquet or .txt file, also with .gz"
BATCH = 1000  # rows that are in memory at once
Records = Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]


@dataclass(frozen=True)
class Table:
    """
    Rows as they came.

    Attributes:
        what: what they were read from, as it is printed.
        names: of all columns that any row has; of JSON lines `records` adds those that it comes upon, since a pass for
            the names alone would parse every row twice.
        records: gives each row with its place there, such as `"line 3"`; may be called again.
        notes: what was found of the form, where it is not what one would expect.
        unit: what the rows are called.
    """

    what: str
    names: list[str]
    records: Records
    notes: tuple[str, ...] = ()
    unit: str = "row"


def kind_of(path: Path) -> str | None:
    """What a file is, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def file_table(path: Path, given: Collection[str] = ()) -> Table:
    """
    The rows of a file.

    Args:
        given: columns that the user names.

    Raises:
        ValueError: it is nothing that rows can be read from; the message goes on after the file's name.
    """
    start = first_bytes(path)
    if not start:
        raise ValueError("which is empty (0 bytes). Give a file with rows")
    if start.startswith(b"PAR1"):
        return _parquet_table(path)
    kind = kind_of(path)
    if kind == "parquet":
        raise ValueError("which is no Parquet file. Write it anew")
    file = text_file(path)
    first = next((line.strip() for _, line in file.lines()), None)
    if first is None or (is_blank(first.replace("\ufeff", "")) and len(start) < 8):
        raise ValueError("which has no rows. Give at least one")
    notes = (f"read as {file.note}",) if file.note else ()
    if kind == "document":
        if first[0] == "{" and _is_json(first):  # a log of JSON lines, and a table as Excel saves it
            return _json_table(file, notes, given)
        if len(columns := _first_names(file)) > 1 and _are_columns(columns):
            return _csv_table(file, notes)
        return documents(path.name, [file], notes)
    if kind == "json" or (kind is None and first[0] in "[{"):
        if first[0] in '[{"' or _is_json(first):
            return _json_table(file, notes, given)
        if kind == "json" and not _are_columns(_first_names(file)):
            return _no_json_lines(file, notes)
        kind = "csv"
    if kind == "csv":
        return _csv_table(file, notes)
    raise ValueError(f"which is of no kind that is known by its suffix {path.suffix!r}. Give a {OFFERED}")


def _is_json(text: str) -> bool:
    try:
        json_rows.parsed(text)
    except json_rows.Twice:
        return True
    except ValueError:
        return False
    return True


def _first_names(file: TextFile) -> list[str]:
    """What the first line names if the file is a table; none where that line is no row of CSV, as in prose."""
    try:
        return delimited.names_of(file, delimited.form_of(file))
    except ValueError:
        return []


def _are_columns(names: list[str], given: Collection[str] = ()) -> bool:
    """Whether these are names of columns, by what they are called or by what the user says."""
    if not set(names).isdisjoint(given):
        return True
    empty: dict[str, Any] = dict.fromkeys(names)
    lists: dict[str, Any] = {name: [] for name in names}
    # KnowUnDo's `labels` and the choices of multiple choice are known by their type
    for first in (empty, empty | {"labels": ""}, lists):
        try:
            choose(names, first)
        except Ambiguous:
            return True
        except Unrecognised:
            continue
        return True
    return False


def _json_table(file: TextFile, notes: tuple[str, ...], given: Collection[str]) -> Table:
    if json_rows.is_lines(file):
        return _json_lines_table(file, notes)
    rows = json_rows.whole_rows(file, lambda names: _are_columns(names, given))
    return Table(file.path.name, list({name: None for row in rows for name in row}), lambda: _listed(rows), notes)


def _json_lines_table(file: TextFile, notes: tuple[str, ...]) -> Table:
    names: list[str] = []
    known: set[str] = set()

    def records() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for place, row in json_rows.line_rows(file):
            if not known.issuperset(row):
                names.extend(name for name in row if name not in known)
                known.update(row)
            yield place, row

    return Table(file.path.name, names, records, notes)


def _listed(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _csv_table(file: TextFile, notes: tuple[str, ...]) -> Table:
    name = file.path.name.lower()
    usual = "\t" if ".tsv" in name or ".tab" in name else ","
    form = delimited.form_of(file, usual)
    mark = delimited.NAMES[form.delimiter]
    said = {f"delimited by {mark}": form.delimiter != usual, f"blanks after the {mark} are skipped": form.skips}
    names = delimited.header_of(file, form)
    return Table(
        file.path.name,
        names,
        lambda: delimited.table_rows(file, form),
        (*notes, *(note for note, holds in said.items() if holds)),
    )


def line_table(file: TextFile, notes: tuple[str, ...] = ()) -> Table:
    """Plain text, a text a line."""

    def records() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in file.lines():
            yield f"line {number}", {"text": line.strip()}

    return Table(file.path.name, ["text"], records, notes, "line")


def _no_json_lines(file: TextFile, notes: tuple[str, ...]) -> Table:
    """Plain text where JSON lines were announced, such as TOFU's `idontknow.jsonl`."""
    lines = list(islice(file.lines(), 2))
    mixed = next((number for number, line in file.lines() if line.lstrip()[0] in "{["), None)
    if mixed is not None or len(lines) < 2:
        number, line = lines[0]
        raise ValueError(f"whose line {number} is no JSON: {shown(line.strip())}. Write each row as a JSON object")
    return line_table(file, (*notes, "no JSON, so that each line is a text"))


def documents(what: str, files: list[TextFile], notes: tuple[str, ...] = ()) -> Table:
    """A document a file, in passages."""

    def records() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            with file.open() as text:
                for number, passage in enumerate(passages(text.read().removeprefix("\ufeff"))):
                    yield f"passage {number} of {file.path.name}", {"text": passage}

    count = f"{len(files)} document{'s' * (len(files) != 1)}, cut into passages"
    return Table(what, ["text"], records, (count, *notes), "passage")


def _parquet_table(path: Path) -> Table:
    def records() -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = 0
        with open_binary(path) as raw:
            for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1

    try:
        with open_binary(path) as raw:
            names = pyarrow.parquet.ParquetFile(raw).schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"which is no whole Parquet file ({error}). Write it anew") from error
    return Table(path.name, names, records)
