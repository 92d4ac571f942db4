# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a cell was made with, beside what is asked for now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .results import Result
from .summary import ORACLE, TARGET


RECORD = "taught.json"  # beside the weights of a target or an oracle: what it was taught with
# The settings that those weights depend on
TAUGHT_WITH = ("model", "data", "split", "books", "retain_rows", "processes", "options")


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
        if found.get(key) != value:
            owner = name if key == "options" and name not in (TARGET, ORACLE) else "teach"
            what = f"`options` for {owner!r}" if key in ("options", "teach") else f"`{key}`"
            folder = path.parent.parent if path.name == RECORD else path.parent
            raise ValueError(
                f"{what} is {value!r}, but {path} was made with {found.get(key)!r}. Choose another `output_dir`, or "
                f"remove the folder {folder}."
            )
