# SPDX-License-Identifier: Apache-2.0
"""The pictures of a benchmark (PNG): the forget-utility plane, quality against time, curves, use of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter_peft.evaluation.results import ORACLE, TARGET, Result
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tasks.tofu import MODEL_UTILITY

from .curves import plot_curves
from .drawing import COLOURS, Figure, new_axes, save, style, without
from .summary import MEAN, Benchmark, Model, is_share


if TYPE_CHECKING:
    from matplotlib.axes import Axes


Point = tuple[float, float]
PROBABILITY = Key("forget", "probability")
# what the forget-utility plane is made of, and its axes; the first that the oracles have
PLANES = {
    (PROBABILITY, MODEL_UTILITY): ("answer probability on the forget set", "model utility"),
    (Key("forget", "verbmem"), Key("retain", "verbmem")): (
        "VerbMem of the forgotten book",
        "VerbMem of the retained books",
    ),
}


def write_figures(benchmark: Benchmark, folder: Path) -> list[Figure]:
    """Write every figure that there are data for: plane.png, time.png, one a curve, experts.png."""
    figures = [
        plot_plane(benchmark, folder / "plane.png"),
        plot_time(benchmark, folder / "time.png"),
        *plot_curves(benchmark, folder),
        plot_experts(benchmark, folder / "experts.png"),
    ]
    return [figure for figure in figures if figure is not None]


def plot_plane(benchmark: Benchmark, path: Path) -> Figure | None:
    """Forgetting against utility (as the paper's Fig. 4): every seed, with the oracles' mean and a box of one unit."""
    from matplotlib.patches import Rectangle

    keys = next((keys for keys in PLANES if set(keys) <= benchmark.bands.keys()), None)
    if keys is None:
        return None
    axes, missing = new_axes(), []
    (x, x_spread), (y, y_spread) = (benchmark.bands[key] for key in keys)
    axes.add_patch(
        Rectangle((x - x_spread, y - y_spread), 2 * x_spread, 2 * y_spread, facecolor="#00000022", edgecolor="black")
    )
    axes.plot(x, y, "+", color="black", markersize=11, markeredgewidth=1.6, label=benchmark.oracle.label)
    for model in (model for model in benchmark.measured if model.name != ORACLE):
        places = [
            (values[keys[0]], values[keys[1]]) if set(keys) <= values.keys() else None for values in model.values
        ]
        missing += _draw_points(axes, benchmark, model, places)
    if keys[0] == PROBABILITY:
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
        axes.set_xlim(-0.001, 1.05)
        axes.set_xticks([0, 0.01, 0.03, 0.1, 0.3, 1], ["0", ".01", ".03", ".1", ".3", "1"])
    axes.margins(0.15)
    axes.set_xlabel(PLANES[keys][0])
    axes.set_ylabel(PLANES[keys][1])
    save(axes, path, legend=True)
    caption = (
        "Each point is a seed. Cross and box: mean of the oracles ± their spread (the unit of the distances), "
        "about where unlearning should end: many a true oracle is outside of the box, too. To the left of it a model "
        "has forgotten too much."
    )
    caption += " The axis is linear below .01, logarithmic above." if keys[0] == PROBABILITY else ""
    zeros = {model.label: ", ".join(map(str, model.zero_parts)) for model in benchmark.measured if model.zero_parts}
    if keys[1] == MODEL_UTILITY and zeros:
        parts = "; ".join(f"of {label} {names}" for label, names in zeros.items())
        caption += f" Model utility is 0 where one of its nine scores is: {parts}."
    return Figure("Forgetting against utility", caption + without(missing, "such score"), path)


def _draw_points(axes: Axes, benchmark: Benchmark, model: Model, places: Sequence[Point | None]) -> list[Result]:
    """A point a seed; a name in the legend counts those that are drawn. The cells that have no place are returned."""
    points, (colour, marker) = [place for place in places if place is not None], style(benchmark, model)
    if points:
        size = 13 if model.name == TARGET else 8
        label = model.label_of(len(points))
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=size, label=label, linestyle="")
    return [cell for cell, place in zip(model.results, places, strict=True) if place is None]


def plot_time(benchmark: Benchmark, path: Path) -> Figure | None:
    """Mean absolute distance to the oracle against seconds of training (as the paper's Fig. 6), a point a seed."""
    axes, missing = new_axes(), []
    for model in benchmark.methods:
        places = [_quality(benchmark, cell, values) for cell, values in zip(model.results, model.values, strict=True)]
        missing += _draw_points(axes, benchmark, model, places)
    if not axes.get_lines():
        return None
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0, 1.25 * axes.dataLim.x1)
    oracles = [benchmark.summary(distances)[MEAN] for distances in benchmark.oracle_distances]
    oracles = oracles if all(map(math.isfinite, oracles)) else []
    axes.set_ylim(0, 1.6 * max(1.5, axes.dataLim.y1, *oracles))
    if oracles:
        axes.axhspan(min(oracles), max(oracles), color="#00000012", linewidth=0, label=benchmark.oracle.label)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("mean distance to the oracle\n(in units of the oracles' spread)")
    save(axes, path, legend=True)
    caption = (
        "Each point is a seed; lower and further left is better. Distances are those of the last row of their "
        "table: the mean over the sets of the mean over each set's scores. The vertical axis is linear below 1, "
        "logarithmic above."
    )
    caption += " Grey: what the oracles have, each against the others." if oracles else ""
    caption += _machines([cell for model in benchmark.methods for cell in model.results if cell not in missing])
    caption += without(missing, "seconds, or no finite distance in every score")
    return Figure("Quality against time", caption, path)


def _quality(benchmark: Benchmark, cell: Result, values: dict[Key, float]) -> Point | None:
    """Where a cell stands; `None` if it lacks seconds or a score, or is infinitely far away."""
    if "training" not in cell.seconds or not set(benchmark.counted) <= values.keys():
        return None
    distance = benchmark.summary(benchmark.distances(values))[MEAN]
    return (cell.seconds["training"], distance) if math.isfinite(distance) else None


def _machines(cells: Sequence[Result]) -> str:
    """Where the seconds come from, and which of them are not to be compared."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(cell.machines.get("training", cell.machine), []).append(f"{cell.name} of seed {cell.seed}")
    if len(found) == 1:
        return f" Machine: {next(iter(found))}."
    names = "; ".join(f"{machine} ({', '.join(cells)})" for machine, cells in found.items())
    return f" Seconds of different machines or threads are no comparison: {names}."


def plot_experts(benchmark: Benchmark, path: Path) -> Figure | None:
    """Share of the answer tokens of each set that each expert took, a panel a method."""
    bars: dict[tuple[str, str], list[float]] = {}
    for cell in (cell for model in benchmark.methods for cell in model.results):
        for key, score in cell.scores.items():
            if is_share(key):
                bars.setdefault((f"{cell.name}, seed {cell.seed}", key.set), []).append(score.value)
    if not bars:
        return None
    several = len({cell for cell, _ in bars}) > 1
    experts = max(map(len, bars.values()))
    axes = new_axes(height=1.2 + 0.42 * len(bars))
    starts = [0.0] * len(bars)
    for expert in range(experts):
        widths = [row[expert] if expert < len(row) else 0.0 for row in bars.values()]
        look: dict[str, Any] = {
            "color": "#BBBBBB" if expert == 0 else COLOURS[(expert - 1) % len(COLOURS)],
            "hatch": "//" if expert > len(COLOURS) else None,
            "label": "retain expert" if expert == 0 else f"forget expert {expert}",
        }
        axes.barh(range(len(bars)), widths, left=starts, edgecolor="white", height=0.7, **look)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [f"{name}  ({cell})" if several else name for cell, name in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answer tokens")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=min(4, experts), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save(axes, path)
    sets = ", ".join(dict.fromkeys(name for _, name in bars))
    return Figure("Use of the experts", f"Where the router sent the answer tokens of {sets}.", path)
