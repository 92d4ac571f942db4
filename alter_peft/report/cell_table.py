# SPDX-License-Identifier: Apache-2.0
"""How each cell was made: seed, time, machine, versions, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tables import Table

from .estimates import seconds_text
from .summary import Benchmark


def cell_table(benchmark: Benchmark) -> Table:
    """A row a cell: seconds by part, then what differs of the environment and of the settings; the rest is above."""
    cells = [cell for model in benchmark.models for cell in (*model.results, *model.failed)]
    places = _frame([{"machine": _machines(cell), **cell.environment} for cell in cells])
    settings = _frame([{name: _text(value) for name, value in cell.settings.items()} for cell in cells])
    seconds = _frame([{f"{part}, s": seconds_text(value) for part, value in cell.seconds.items()} for cell in cells])
    places_shown, settings_shown = (frame.loc[:, frame.nunique() > 1] for frame in (places, settings))
    shown = pd.concat([seconds, places_shown], axis=1)
    if settings_shown.size:
        rows = settings_shown.to_dict("records")
        shown["settings"] = [
            "; ".join(f"{name}: {text}" for name, text in row.items() if pd.notna(text)) for row in rows
        ]
    caption = "Seconds of each part of a cell, empty where it was not done"
    for what, frame in (("Alike in all cells", places), ("Settings of all", settings)):
        alike = {name: frame[name].dropna().iloc[0] for name in frame.columns[frame.nunique() == 1]}
        known = [f"{name}: {text}" for name, text in alike.items() if text != "null"]
        caption += f". {what}: {'; '.join(known)}" if known else ""
    names = list(map(cell_name, cells))
    rows_of_texts = [[name, *row] for name, row in zip(names, shown.fillna("").to_numpy().tolist(), strict=True)]
    return Table("Cells", f"{caption}.", ["cell", *shown.columns], rows_of_texts)


def _frame(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """A row a cell, with what it does not have as missing: it may have failed before that was recorded."""
    return pd.DataFrame(
        rows, index=range(len(rows)), columns=list(dict.fromkeys(name for row in rows for name in row))
    )


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
