# SPDX-License-Identifier: Apache-2.0
"""What a cell was made with, beside what is asked for now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alter_peft.evaluation.results import ORACLE, TARGET, Result


RECORD = "taught.json"  # beside the weights of a target or an oracle: what it was taught with
CONTENT = "content"  # the setting that says what the rows are, not where they came from
OF_TEACHING = {"forget", "retain", "bystanders"}  # what of it taught weights depend on
# The settings that those weights depend on
TAUGHT_WITH = (
    "model",
    "data",
    "split",
    "retain_rows",
    "bystander_rows",
    "books",
    "task_data",
    "processes",
    "options",
    "chat_template_kwargs",
)


def corrected(result: Result, settings: Mapping[str, Any]) -> set[str]:
    """The options that differ from those of a cell that failed: it is made anew; one that was interrupted is not."""
    names = {"options", "teach"} & settings.keys() & result.settings.keys() if result.failed else set()
    return {name for name in names if result.settings[name] != settings[name]}


def check_made_with(name: str, path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` that names the first difference.

    Args:
        name: of the cell.
        path: the file that says what it was made with.
    """
    for key, value in wanted.items():
        if key == CONTENT:
            _check_content(path, found.get(key), value, wanted)
        elif found.get(key) != value:
            owner = name if key == "options" and name not in (TARGET, ORACLE) else "teach"
            what = f"`options` for {owner!r}" if key in ("options", "teach") else f"`{key}`"
            raise ValueError(f"{what} is {value!r}, but {path} was made with {found.get(key)!r}. {_fix(path)}")


def _check_content(path: Path, found: Any, wanted: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """As `check_made_with`, of the rows; nothing is known of them in what older versions made."""
    changed = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)] if found else []
    if changed:
        source = next((name for name in ("books", "task_data") if settings.get(name)), "data")
        raise ValueError(
            f"The set {changed[0]!r} of `{source}` is {wanted.get(changed[0], 'none')}, but {path} was made with "
            f"{found.get(changed[0], 'none')}: the rows or their order are others. {_fix(path)}"
        )


def _fix(path: Path) -> str:
    folder = path.parent.parent if path.name == RECORD else path.parent
    return f"Choose another `output_dir`, or remove the folder {folder}."
