# SPDX-License-Identifier: Apache-2.0
"""How each cell was made: seed, time, machine, versions, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tables import Table

from .formatting import seconds_text
from .summary import Benchmark


# settings that have no bearing on a grid of books
OF_TOFU = ("data", "split", "retain_rows", "rows", "requests", "max_new_tokens")


def cell_table(benchmark: Benchmark) -> Table:
    """A row a cell: seconds by part, then what differs of the environment and of the settings; the rest is above."""
    cells = [cell for model in benchmark.models for cell in (*model.results, *model.failed)]
    places = [{"machine": _machines(cell), **cell.environment} for cell in cells]
    settings = [{key: _text(value) for key, value in settings_of(cell).items()} for cell in cells]
    parts = list(dict.fromkeys(part for cell in cells for part in cell.seconds))
    place_names, setting_names = _differing(places), _differing(settings)
    columns = ["cell", *(f"{part}, s" for part in parts), *place_names, *(["settings"] if setting_names else [])]
    table = Table("Cells", _caption(places, settings), columns)
    for cell, place, setting in zip(cells, places, settings, strict=True):
        own = [f"{name}: {setting[name]}" for name in setting_names if name in setting]
        table.rows.append(
            [
                cell_name(cell),
                *(seconds_text(cell.seconds[part]) if part in cell.seconds else "" for part in parts),
                *(place.get(name, "") for name in place_names),
                *(["; ".join(own)] if setting_names else []),
            ]
        )
    return table


def settings_of(cell: Result) -> dict[str, Any]:
    """The settings of a cell; where it is about books, without those that are of TOFU alone."""
    of_books = cell.settings.get("books") is not None
    return {name: value for name, value in cell.settings.items() if not (of_books and name in OF_TOFU)}


def cell_name(cell: Result) -> str:
    """Model, seed, and whether it has no scores."""
    state = "" if cell.scores or cell.error is None else " (failed)" if cell.failed else " (stopped)"
    return f"{cell.name}, seed {cell.seed}{state}"


def _machines(cell: Result) -> str:
    """The machine of a cell, or each of several with the parts that took their seconds there."""
    parts: dict[str, list[str]] = {}
    for part in cell.seconds:
        parts.setdefault(cell.machines.get(part, cell.machine), []).append(part)
    if len(parts) < 2:
        return next(iter(parts), cell.machine)
    return "; ".join(f"{machine} ({', '.join(names)})" for machine, names in parts.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """The names that do not have the same value wherever they are recorded: a cell may have failed before that."""
    return [name for name, values in _values(found).items() if len(values) > 1]


def _values(found: Sequence[Mapping[str, str]]) -> dict[str, set[str]]:
    values: dict[str, set[str]] = {}
    for name, value in (item for one in found for item in one.items()):
        values.setdefault(name, set()).add(value)
    return values


def _caption(places: Sequence[Mapping[str, str]], settings: Sequence[Mapping[str, str]]) -> str:
    caption = "Seconds of each part of a cell, empty where it was not done"
    for what, found in (("Alike in all cells", places), ("Settings of all", settings)):
        values = {name: next(iter(values)) for name, values in _values(found).items() if len(values) == 1}
        alike = [f"{name}: {value}" for name, value in values.items() if value != "null"]
        caption += f". {what}: {'; '.join(alike)}" if alike else ""
    return f"{caption}."
