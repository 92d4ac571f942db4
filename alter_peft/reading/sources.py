# SPDX-License-Identifier: Apache-2.0
"""What a source is: a file, a folder or a Hub data set; the rows in it as they came."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .files import BATCH, OFFERED, SUFFIXES, Table, documents, file_table, kind_of
from .texts import TextFile, text_file


HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:/\\]*))?(?::(?P<split>[^/\\]*))?")

UNREAD = (
    ".zst",
    ".zip",
    ".arrow",
    ".feather",
    ".docx",
    ".doc",
    ".xlsx",
    ".xls",
    ".odt",
    ".ods",
    ".pdf",
    ".html",
    ".xml",
    ".yaml",
    ".db",
    ".sqlite",
    ".pkl",
)  # of files that are not read, but meant
LIKE_SUFFIX = 0.75  # likeness of a suffix, by difflib, from which on it is taken for a mistyped one


def is_local(source: str) -> bool:
    """Whether this can only be meant as a file or a folder, which is never looked up on the Hub."""
    name = source.split(":")[0] if ":" in source and "\\" not in source else source
    return (
        Path(source).expanduser().exists()
        or _is_file_name(Path(name))
        or source.startswith((".", "/", "~"))
        or any(character in source for character in "\\*?")
        or name.count("/") > 1
        or ("/" in name and Path(name).parent.is_dir())
        or HUB.fullmatch(source) is None
    )


def _is_file_name(path: Path) -> bool:
    """Whether a name has a suffix: any with a letter where there is no `/`, and else one of a file, or like one."""
    if path.name == str(path):
        return any(character.isalpha() for character in path.suffix)
    return any(get_close_matches(suffix.lower(), [*SUFFIXES, *UNREAD], 1, LIKE_SUFFIX) for suffix in path.suffixes)


def table_of(source: str, given: Collection[str] = ()) -> Table:
    """
    The rows of a file, a folder or a Hub data set.

    Args:
        given: columns that the user names.

    Raises:
        ValueError: it is not there, or nothing that rows can be read from; the message goes on after the source.
    """
    path = Path(source).expanduser()
    if not is_local(source):
        return _hub_table(source)
    if not path.exists():
        owner = "" if "/" in source or kind_of(path) else ". A Hub data set is given with its owner, as owner/name"
        raise ValueError(f"but there is no such file{_neighbour(path)}{owner if HUB.fullmatch(source) else ''}")
    return _folder_table(path, given) if path.is_dir() else file_table(path, given)


def _neighbour(path: Path) -> str:
    there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, there, n=1)
    return f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""


def _folder_table(folder: Path, given: Collection[str]) -> Table:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.name for one in folder.iterdir() if one.is_dir())
        if len(splits) != 1:
            raise ValueError(f"which has the splits {splits}. Give one of them, such as {str(folder / splits[0])!r}")
        folder = folder / splits[0]
    if (folder / "state.json").is_file():
        return _dataset_table(_loaded(lambda: load_from_disk(str(folder))), folder.name)
    files = sorted(one for one in folder.rglob("*") if one.is_file() and not one.name.startswith("."))
    kinds = sorted({kind_of(one) or one.suffix or one.name for one in files})
    if kinds == ["document"]:
        empty = [one.name for one in files if not one.stat().st_size]
        if empty:
            raise ValueError(f"whose file {empty[0]!r} is empty (0 bytes). Remove it")
        found = _text_files(files)
        notes = tuple(f"{file.path.name} read as {file.note}" for file in found if file.note)
        return documents(f"{folder.name}/", found, notes)
    if len(files) == 1 and kinds[0] in SUFFIXES.values():
        return file_table(files[0], given)
    held = f"files of the kinds {kinds}" if len(kinds) > 1 else f"{len(files)} files"
    raise ValueError(
        f"which is a folder with {held}. Give one file, or a folder of .txt files or of `save_to_disk` alone"
    )


def _text_files(paths: list[Path]) -> list[TextFile]:
    found = []
    for path in paths:
        try:
            found.append(text_file(path))
        except ValueError as error:
            raise ValueError(f"whose file {path.name!r}, {error}") from error
    return found


def _dataset_table(dataset: Any, what: str) -> Table:
    plain = dataset.with_format("arrow")
    labels = {name: kind for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)}

    def records() -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = 0
        for batch in plain.iter(BATCH):
            for row in batch.to_pylist():
                named = {name: kind.int2str(row[name]) for name, kind in labels.items() if row[name] is not None}
                yield f"row {number}", {**row, **named}
                number += 1

    if len(dataset) == 0:
        raise ValueError("which has no rows. Give at least one")
    return Table(what, list(dataset.column_names), records)


def _hub_table(source: str) -> Table:
    parts = HUB.fullmatch(source)
    name, config, split = (
        (parts[key] or None for key in ("name", "config", "split")) if parts else (source, None, None)
    )
    found = _loaded(lambda: load_dataset(str(name), config, split=split))
    if isinstance(found, DatasetDict):
        splits = list(found)
        split = "train" if "train" in splits else splits[0]
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"which has the splits {splits}. Name one, as in '{name}:{config or ''}:{splits[0]}'")
        found = found[split]
    if not isinstance(found, Dataset):
        raise ValueError(f"which is a {type(found).__name__}. Give a data set of rows")
    return _dataset_table(found, f"{name}{f':{config}' if config else ''}, split {split}")


def _loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"which could not be read ({error.__cause__ or error}). Give a {OFFERED}, a folder that "
            "`save_to_disk` wrote, or a Hub data set as name, name:config or name:config:split"
        ) from error
