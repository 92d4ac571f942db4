# SPDX-License-Identifier: Apache-2.0
"""What all figures of a benchmark share: the look of each model, axes, and what is said of what is not drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alter_peft.evaluation.results import ORACLE, TARGET, Result

from .summary import Benchmark, Model


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Told apart by the colour-blind and dark enough to be read as text; beyond them markers do it
COLOURS = ("#0072B2", "#D55E00", "#3FA34D", "#E7298A", "#5C4400", "#9966FF", "#004D40", "#332288")
SPECIAL = {TARGET: "#666666", ORACLE: "#000000"}
MARKERS = "osD^vPXp<>h"


class Figure(NamedTuple):
    """A picture that was written, with what it is called and how it is to be read."""

    title: str
    caption: str
    path: Path


def style(benchmark: Benchmark, model: Model) -> tuple[str, str]:
    """Colour and marker of a model, the same in all figures."""
    if model.name in SPECIAL:
        return SPECIAL[model.name], {TARGET: "*", ORACLE: "+"}[model.name]
    place = [other for other in benchmark.models if other.name not in SPECIAL].index(model)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]  # numbers without a common divisor


def new_axes(width: float = 8.5, height: float = 4.5) -> Axes:
    """An empty picture, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def save(axes: Axes, path: Path, legend: bool = False) -> None:
    """Write the picture, with the names of what is drawn beside the axes if a legend is asked for."""
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.get_figure().savefig(path, dpi=150)  # type: ignore[union-attr]


def without(cells: Sequence[Result], what: str) -> str:
    """Which cells are not drawn, for they have no such thing; nothing if all are."""
    names = ", ".join(f"{cell.name} of seed {cell.seed}" for cell in cells)
    return f" Without {names}: no {what}." if cells else ""
