# SPDX-License-Identifier: Apache-2.0
"""A source -> rows under the names that trainers and metrics know: `read_rows`."""

from __future__ import annotations

import lzma
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset

from alter_peft.subdomains import MOST_DOMAINS
from alter_peft.words import counted

from .canonical import BadCell, Row, canonical, features
from .columns import EXTRAS, Taken, Unrecognised, choose
from .files import BATCH, Table, line_table
from .sources import table_of
from .texts import text_file
from .values import shown


MOST_LEFT = 8  # columns that are named as left alone


class Rows(NamedTuple):
    """
    What was read.

    dataset: the rows, in a file of their own that is removed when Python ends, under these names: `prompt` and
        `completion` (texts, or turns of a chat), `text`, or `input_ids`; and, if they are there, `domain`,
        `paraphrase`, `rephrased`, `wrong`.
    taken: one line that says what was taken of what.
    names: the columns of the source.
    """

    dataset: Dataset
    taken: str
    names: list[str]


def read_rows(
    flag: str,
    source: str,
    columns: Mapping[str, str] | None = None,
    text_field: str = "text",
    whole_chats: bool = False,
    prompts_alone: bool = False,
    extras: Collection[str] = EXTRAS,
) -> Rows:
    """
    Rows of a file, a folder or a Hub data set, whatever their form, in constant memory but for JSON that is one value.

    Args:
        flag: what the source was given by, such as `"--forget"`, for messages and the line that says what was taken.
        source: a file (JSON lines or JSON in any shape, CSV with any delimiter, Parquet; also compressed), a folder
            that `save_to_disk` wrote, a .txt file or a folder of them (a document each), or a Hub data set as `name`,
            `name:config` or `name:config:split`. What looks like a file is never looked up on the Hub.
        columns: what a row holds -> its column, where the names are none of `reading.columns`; `""` for none. A source
            that has none of these columns is read by its own names.
        text_field: the column of plain texts, before all other names of one.
        whole_chats: whether a chat is a row, and not each answer of the assistant.
        prompts_alone: whether rows without an answer will do; then each line of a .txt file is a prompt.
        extras: what is read beside the text; of `domain`, `paraphrase`, `rephrased`, `wrong` and `alternate`, by
            default all.

    Raises:
        ValueError: there is no such source, nothing that rows can be read from, or a row with an unusable value: one
            sentence that names the flag, the source, the line or row, the column, the value and the fix.
    """
    try:
        given = dict(columns or {})
        table = table_of(source, [column for column in given.values() if column])
        if prompts_alone and table.unit == "passage" and Path(source).expanduser().is_file():
            table = line_table(text_file(Path(source).expanduser()))
        first = next((row for _, row in table.records()), None)
        if first is None:
            raise ValueError("which has no rows. Give at least one")
        taken, dataset, count = _taken(
            table, lambda: _chosen(table, first, given, text_field, whole_chats, prompts_alone, extras)
        )
    except Unrecognised as error:
        raise ValueError(
            f"`{flag}` is {source!r}, which {error}. Say which hold the text by `--columns`, such as `--columns "
            "prompt=question completion=answer` or `--columns text=body`."
        ) from error
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        if isinstance(error, ValueError):
            raise ValueError(f"`{flag}` is {source!r}, {error}.") from error
        raise ValueError(f"`{flag}` is {source!r}, which could not be read to its end ({error}).") from error
    return Rows(dataset, f"{flag.lstrip('-')}: {_line(table, taken, dataset, count)}", table.names)


def read_all(
    sources: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
    extras: Mapping[str, Collection[str]] | None = None,
    **options: Any,
) -> dict[str, Rows]:
    """
    Several sources, by the flag that each was given by; `options` as of `read_rows`.

    Args:
        extras: flag -> as of `read_rows`; none for a flag that is not named.

    Raises:
        ValueError: as of `read_rows`, or one of `columns` is in none of the sources.
    """
    beside = dict.fromkeys(sources, EXTRAS) if extras is None else {flag: extras.get(flag, ()) for flag in sources}
    found = {
        flag: read_rows(flag, source, columns, extras=beside[flag], **options) for flag, source in sources.items()
    }
    there = {name for rows in found.values() for name in rows.names}
    missing = [f"{name}={column}" for name, column in (columns or {}).items() if column and column not in there]
    if missing:
        raise ValueError(f"`--columns` has {missing[0]!r}, but the columns are {sorted(there)}. Correct it.")
    return found


def _chosen(
    table: Table,
    first: Mapping[str, Any],
    given: Mapping[str, str],
    text_field: str,
    whole_chats: bool,
    prompts_alone: bool,
    extras: Collection[str],
) -> Taken:
    """As `choose`, of the columns that are known so far."""
    if not set(table.names) & set(given.values()):
        given = {name: column for name, column in given.items() if not column}
    names = {name: first.get(name) for name in table.names}
    taken = choose(table.names, names, given, text_field, prompts_alone, extras)
    return replace(taken, kind="whole chats") if whole_chats and taken.kind == "chats" else taken


def _taken(table: Table, choice: Callable[[], Taken]) -> tuple[Taken, Dataset, int]:
    """What is taken, and as `_written`; again from the start where later rows have columns that change the choice."""
    try:
        taken = choice()
    except Unrecognised:
        for _ in table.records():  # for the names
            pass
        taken = choice()
    while True:
        known = len(table.names)
        dataset, count = _written(table, taken)
        if len(table.names) == known:
            return taken, dataset, count
        before, taken = taken, choice()
        if taken == before:  # but for what is left alone
            return taken, dataset, count


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the rows are kept until Python ends."""
    return tempfile.TemporaryDirectory(prefix="alter_peft_rows_", ignore_cleanup_errors=True)


def _written(table: Table, taken: Taken) -> tuple[Dataset, int]:
    """The rows in an Arrow file, which is read from the disk as it is needed, and how many came."""
    domains: Counter[str | None] = Counter()
    count = 0

    def rows() -> Iterator[Row]:
        nonlocal count
        for place, row in table.records():
            count += 1
            try:
                found = canonical(row, taken)
            except BadCell as error:
                raise ValueError(
                    f"whose {place} has {shown(error.value)} in the column {error.column!r}, {error.problem}"
                ) from error
            if taken.maybe_domain and len(domains) <= MOST_DOMAINS:
                domains[found[0]["domain"]] += 1
            yield from found

    has_domain = "domain" in taken.columns or taken.maybe_domain is not None
    with tempfile.NamedTemporaryFile(dir=_folder().name, suffix=".arrow", delete=False) as file:
        schema = features(taken, has_domain).arrow_schema
        with pyarrow.ipc.new_stream(file, schema) as writer:
            for batch in _batches(rows(), BATCH):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
    if not count:
        Path(file.name).unlink()
        raise ValueError("which has no rows. Give at least one")
    dataset = Dataset.from_file(file.name)
    if taken.maybe_domain and not is_domain(domains, count):
        dataset = dataset.remove_columns("domain")
    return dataset, count


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch


def is_domain(values: Counter[str | None], count: int) -> bool:
    """Whether a column that no one called `domain` is one: every row has a value, few values, each of several rows."""
    return None not in values and len(values) <= min(MOST_DOMAINS, max(1, count // 2))


def _line(table: Table, taken: Taken, dataset: Dataset, rows: int) -> str:
    """What was taken, in a line."""
    line = f"{counted(rows, table.unit)} of {table.what}: {described(taken, dataset)}"
    return "; ".join([line, *table.notes])


def described(taken: Taken, dataset: Dataset) -> str:
    """What was taken of which columns to make a data set, and which were left alone."""
    named = {"question": "prompt", "answer": "completion"} if taken.kind == "choices" else {}
    parts = [_from(named.get(name, name), column) for name, column in taken.columns.items() if name != "masked"]
    if taken.beside:
        parts[0] += f" and {' and '.join(map(repr, taken.beside))}"
    left = list(taken.left)
    if taken.maybe_domain and "domain" in dataset.column_names:
        parts.append(_from("domain", taken.maybe_domain))
    elif taken.maybe_domain and taken.maybe_domain not in taken.columns.values():
        left.append(f"{taken.maybe_domain} (of too many values to be a sub-domain)")
    line = ", ".join(parts)
    if taken.kind == "chats":
        line += f"; the assistant's turns alone count ({len(dataset)}), each with all before it as its prompt"
    if len(left) > MOST_LEFT:
        left = [*left[:MOST_LEFT], f"and {len(left) - MOST_LEFT} more"]
    return f"{line}; left alone: {', '.join(left)}" if left else line


def _from(name: str, column: str) -> str:
    return name if name == column else f"{name} from {column!r}"
