# SPDX-License-Identifier: Apache-2.0
"""A number of several seeds, and how the tables of a report show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from alter_peft.evaluation.tables import MOST_PLACES, places


class Estimate(NamedTuple):
    """
    A mean over the seeds of a model.

    spread: sample standard deviation; `None` for a single value.
    measured, cells: how many of how many measured seeds have the score.
    """

    mean: float
    spread: float | None
    measured: int
    cells: int


def estimate(values: Sequence[float], cells: int) -> Estimate | None:
    """Mean and spread of what was found in so many cells; `None` if nothing was."""
    if not values:
        return None
    spread = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return Estimate(mean(values), spread, len(values), cells)


def estimate_text(found: Estimate, digits: int = 3, sign: str = "") -> str:
    """
    `0.051`, `0.051 ± 0.010` for several seeds, and how many of them where some lack the score.

    The spread has two significant digits, and the mean as many places; a mean without spread has two at least, up to
    six places. `± 0` is no spread at all.

    Args:
        digits: places after the point at least.
        sign: `"+"` shows it of positive means too.
    """
    shown = places(found.spread or found.mean, digits)
    spread = "" if found.spread is None else f" ± {_spread_text(found.spread, shown)}"
    return f"{found.mean:{sign}.{shown}f}{spread}{part_text(found.measured, found.cells)}"


def _spread_text(spread: float, shown: int) -> str:
    if not spread:
        return "0"
    return f"{spread:.{shown}f}" if spread >= 10**-MOST_PLACES else f"{spread:.0e}"


def part_text(measured: int, cells: int) -> str:
    """Nothing, or how many of the seeds have a score."""
    return "" if measured == cells else f" ({measured} of {cells} seeds)"


def distance_text(found: Estimate, sign: str = "+") -> str:
    """`+2.0`, `+2.0 ± 1.4` for several seeds: more places than one would say nothing of a distance."""
    if math.isnan(found.mean):  # infinitely far above and below
        return "±inf"
    spread = "" if found.spread is None else f" ± {found.spread:.1f}"
    return f"{found.mean:{sign}.1f}{spread}{part_text(found.measured, found.cells)}"


def seconds_text(seconds: float) -> str:
    """Whole seconds, or tenths of fewer than ten."""
    return f"{seconds:.0f}" if seconds >= 9.95 else f"{seconds:.1f}"
