# SPDX-License-Identifier: Apache-2.0
"""Numbers as the tables of a report show them."""

from __future__ import annotations

import math

from .summary import Estimate


MOST_PLACES = 6  # after the point; a smaller spread is shown as a power of ten


def estimate_text(found: Estimate, digits: int = 3, sign: str = "") -> str:
    """
    `0.051`, `0.051 ± 0.010` for several seeds, and how many of them where some lack the score.

    The spread has two significant digits, and the mean as many places; a mean without spread has two at least, up to
    six places. `± 0` is no spread at all.

    Args:
        digits: places after the point at least.
        sign: `"+"` shows it of positive means too.
    """
    places = _places(found.spread or found.mean, digits)
    spread = "" if found.spread is None else f" ± {_spread_text(found.spread, places)}"
    return f"{found.mean:{sign}.{places}f}{spread}{part_text(found.measured, found.cells)}"


def _places(value: float, digits: int) -> int:
    """Places after the point for two significant digits of a value."""
    if not value or not math.isfinite(value):
        return digits
    return min(max(digits, 1 - math.floor(math.log10(abs(float(f"{value:.1e}"))))), MOST_PLACES)


def _spread_text(spread: float, places: int) -> str:
    if not spread:
        return "0"
    return f"{spread:.{places}f}" if spread >= 10**-MOST_PLACES else f"{spread:.0e}"


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
