# SPDX-License-Identifier: Apache-2.0
"""The pictures of a benchmark (PNG): the forget-utility plane, quality against time, curves, use of the experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alter_peft.evaluation.results import Result

from .curves import plot_curves
from .drawing import COLOURS, Figure, Point, middle, new_axes, save, style, without
from .labels import Label, label_points
from .summary import MEAN, MODEL_UTILITY, ORACLE, SHARE, TARGET, Benchmark, Model


# what the forget-utility plane is made of, and its axes; the first that the oracles have
PLANES = {
    ("forget/probability", "utility/model_utility"): ("answer probability on the forget set", "model utility"),
    ("forget/verbmem", "retain/verbmem"): ("VerbMem of the forgotten book", "VerbMem of the retained books"),
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
    axes, labels, missing = new_axes(), [], []
    (x, x_spread), (y, y_spread) = (benchmark.bands[key] for key in keys)
    box = axes.add_patch(
        Rectangle((x - x_spread, y - y_spread), 2 * x_spread, 2 * y_spread, facecolor="#00000022", edgecolor="black")
    )
    axes.plot(x, y, "+", color="black", markersize=11, markeredgewidth=1.6)
    labels.append(Label(x, y, benchmark.oracle.label, "black"))
    for model in benchmark.measured:
        colour, marker = style(benchmark, model)
        points, lacking = _points(model, lambda values: (values[keys[0]], values[keys[1]]), set(keys))
        missing += lacking
        if points and model.name != ORACLE:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=13 if model.name == TARGET else 8)
            labels.append(Label(*middle(points), model.label_of(len(points)), colour))
    is_probability = keys[0] == "forget/probability"
    if is_probability:
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
        axes.set_xlim(-0.001, 1.05)
        axes.set_xticks([0, 0.01, 0.03, 0.1, 0.3, 1], ["0", ".01", ".03", ".1", ".3", "1"])
    axes.margins(0.15)
    axes.set_xlabel(PLANES[keys][0])
    axes.set_ylabel(PLANES[keys][1])
    label_points(axes, labels, [box])
    save(axes, path)
    caption = (
        "Each point is a seed. Cross and box: mean of the oracles ± their spread (the unit of the distances), "
        "about where unlearning should end: many a true oracle is outside of the box, too. To the left of it a model "
        "has forgotten too much."
    )
    caption += " The axis is linear below .01, logarithmic above." if is_probability else ""
    zeros = [f"of {model.label} {', '.join(model.zero_parts)}" for model in benchmark.measured if model.zero_parts]
    if keys[1] == MODEL_UTILITY and zeros:
        caption += f" Model utility is 0 where one of its nine scores is: {'; '.join(zeros)}."
    return Figure("Forgetting against utility", caption + without(missing, "such score"), path)


def _points(
    model: Model, place: Callable[[dict[str, float]], Point], needed: set[str]
) -> tuple[list[Point], list[Result]]:
    """Where each seed of a model stands, and the cells that lack a number for it or stand infinitely far away."""
    points, missing = [], []
    for cell, values in zip(model.results, model.values, strict=True):
        point = place(values) if needed <= values.keys() else (math.inf, math.inf)
        if all(map(math.isfinite, point)):
            points.append(point)
        else:
            missing.append(cell)
    return points, missing


def plot_time(benchmark: Benchmark, path: Path) -> Figure | None:
    """Mean absolute distance to the oracle against seconds of training (as the paper's Fig. 6), a point a seed."""
    axes, labels, missing = new_axes(), [], []
    needed = {"seconds/training", *benchmark.counted}

    def place(values: dict[str, float]) -> Point:
        return values["seconds/training"], benchmark.summary(benchmark.distances(values))[MEAN]

    for model in benchmark.methods:
        colour, marker = style(benchmark, model)
        points, lacking = _points(model, place, needed)
        missing += lacking
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=8)
            labels.append(Label(*middle(points), model.label_of(len(points)), colour))
    if not labels:
        return None
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(0, 1.25 * axes.dataLim.x1)
    oracles = [benchmark.summary(distances)[MEAN] for distances in benchmark.oracle_distances]
    oracles = oracles if all(map(math.isfinite, oracles)) else []
    axes.set_ylim(0, 1.6 * max(1.5, axes.dataLim.y1, *oracles))
    if oracles:
        axes.axhspan(min(oracles), max(oracles), color="#00000012", linewidth=0)
        within: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": "#606060", "fontsize": 9}
        axes.text(0.01, max(oracles), "oracles, each against the others", va="bottom", **within)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("mean distance to the oracle\n(in units of the oracles' spread)")
    label_points(axes, labels, [])
    save(axes, path)
    caption = (
        "Each point is a seed; lower and further left is better. Distances are those of the last row of their "
        "table: the mean over the sets of the mean over each set's scores. The vertical axis is linear below 1, "
        "logarithmic above."
    )
    caption += " Grey: what the oracles have, each against the others." if oracles else ""
    caption += _machines([cell for model in benchmark.methods for cell in model.results if cell not in missing])
    caption += without(missing, "seconds, or no finite distance in every score")
    return Figure("Quality against time", caption, path)


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
    found: dict[str, dict[str, list[float]]] = {}
    for model in benchmark.methods:
        for cell in model.results:
            shares: dict[str, list[float]] = {}
            for key, score in cell.scores.items():
                name, _, metric = key.rpartition("/")
                if metric.startswith(SHARE):
                    shares.setdefault(name, []).append(score.value)
            if shares:
                found[f"{model.name}, seed {cell.seed}"] = shares
    if not found:
        return None
    sets = list(dict.fromkeys(name for shares in found.values() for name in shares))
    names = [f"{name}  ({cell})" if len(found) > 1 else name for cell, shares in found.items() for name in shares]
    bars = [row for shares in found.values() for row in shares.values()]
    experts = max(map(len, bars))
    axes = new_axes(height=1.2 + 0.42 * len(bars))
    starts = [0.0] * len(bars)
    for expert in range(experts):
        widths = [row[expert] if expert < len(row) else 0.0 for row in bars]
        colour = "#BBBBBB" if expert == 0 else COLOURS[(expert - 1) % len(COLOURS)]
        hatch = "//" if expert > len(COLOURS) else None
        name = "retain expert" if expert == 0 else f"forget expert {expert}"
        axes.barh(
            range(len(bars)), widths, left=starts, color=colour, edgecolor="white", label=name, height=0.7, hatch=hatch
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answer tokens")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=min(4, experts), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save(axes, path)
    return Figure("Use of the experts", f"Where the router sent the answer tokens of {', '.join(sets)}.", path)
