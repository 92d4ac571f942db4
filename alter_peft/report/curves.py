# SPDX-License-Identifier: Apache-2.0
"""Pictures of what is measured more than once: curves by step of relearning or by request."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import COLOURS, SPECIAL, Figure, middle, new_axes, save, style, without
from .labels import Label, label_ends
from .request_table import REQUEST, REQUESTS, after_requests, request_numbers
from .summary import ORACLE, Benchmark, Model


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# curves over requests one after another that are drawn as lines
OF_REQUESTS = (f"{REQUESTS}retain", f"{REQUESTS}utility", f"{REQUESTS}forgotten")


def plot_curves(benchmark: Benchmark, folder: Path) -> list[Figure]:
    """One picture a curve, and for each method that was given requests one of them all."""
    figures = []
    curves = dict.fromkeys(key for model in benchmark.measured for cell in model.results for key in cell.curves)
    for key in curves:
        if key.startswith(REQUESTS) and key not in OF_REQUESTS:
            continue  # `plot_requests` has each request by itself
        name = key.replace("/", "-").replace(" ", "-")
        figures.append(plot_curve(benchmark, key, folder / f"{name}.png"))
    for model in benchmark.measured:
        figure = plot_requests(model, folder / f"requests-each-{model.name}.png")
        figures += [] if figure is None else [figure]
    return figures


def plot_requests(model: Model, path: Path) -> Figure | None:
    """What is left of each request after each: rows are what was asked to be forgotten, columns how many were made."""
    means = after_requests(model)
    requests = request_numbers(means)
    if not requests:
        return None
    curves = [means[f"{REQUEST}{number}"] for number in requests]
    counts = sorted({count for curve in curves for count in curve})
    values = [[curve[count].mean if count in curve else math.nan for count in counts] for curve in curves]
    axes = new_axes(2 + 0.5 * len(counts), 1.2 + 0.34 * len(requests))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in product(range(len(requests)), range(len(counts))):
        value = values[row][column]
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    for row, number in enumerate(requests):  # what was made by then is to the right
        if number in counts:
            axes.vlines(counts.index(number) - 0.5, row - 0.5, row + 0.5, color=COLOURS[1], linewidth=2.5)
    axes.grid(visible=False)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(requests)), [str(number) for number in requests])
    axes.set_xlabel("requests so far")
    axes.set_ylabel("request")
    save(axes, path)
    caption = (
        "Mean answer probability on what each request asks to forget, over seeds: to the left of its line before the "
        "request was made, to the right after it and all later ones."
    )
    return Figure(f"Each request: {model.label}", caption, path)


def plot_curve(benchmark: Benchmark, key: str, path: Path) -> Figure:
    """
    One curve of every model that has it, a line a seed: relearning by step, or what requests one after another leave
    (as the paper's Fig. 5).
    """
    of_requests = key.startswith(REQUESTS)
    axes = new_axes()
    ends, ticks = _draw_curves(axes, benchmark, key)
    level = benchmark.oracle.estimate("forget/probability") if key == f"{REQUESTS}forgotten" else None
    if level is not None:
        axes.axhline(level.mean, color=SPECIAL[ORACLE], linestyle="--", linewidth=1.6)
        ends.append(Label(ticks[-1], level.mean, benchmark.oracle.label, SPECIAL[ORACLE]))
    if not of_requests:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0], ticks[-1] if len(ticks) > 1 else ticks[0] + 1)
    name, _, metric = key.removeprefix(REQUESTS).rpartition("/")
    is_probability = of_requests or metric == "probability"
    axes.set_ylim(0, 1.02 if is_probability else 1.1 * axes.dataLim.y1)
    axes.set_xlabel("requests so far" if of_requests else "steps of relearning")
    asked = metric if of_requests else name.rpartition("/")[2].replace("_", " ")
    axes.set_ylabel(f"{'answer probability' if is_probability else metric} ({asked})")
    label_ends(axes, ends)
    save(axes, path)
    models = benchmark.methods if of_requests else benchmark.measured
    missing = [cell for model in models for cell in model.results if not cell.curves.get(key)]
    dashed = level is not None or any(cell.curves.get(key) for cell in benchmark.oracle.results)
    caption = f"Each line is a seed{'; the oracle is dashed' if dashed else ''}." + without(missing, "such curve")
    title = f"Requests: {metric}" if of_requests else name.replace("_", " ").replace("/", ", ").capitalize()
    return Figure(title, caption, path)


def _draw_curves(axes: Axes, benchmark: Benchmark, key: str) -> tuple[list[Label], list[float]]:
    """A line a seed; where each model's end, and all places on the horizontal axis."""
    ends, ticks = [], set()
    for model in benchmark.measured:
        curves = [sorted(cell.curves[key]) for cell in model.results if cell.curves.get(key)]
        if not curves:
            continue
        colour, marker = style(benchmark, model)
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "clip_on": False}
        for points in curves:
            axes.plot(*zip(*points, strict=True), "--" if model.name == ORACLE else "-", **look)
            ticks |= {x for x, _ in points}
        last = [points[-1] for points in curves]
        ends.append(Label(*middle(last), model.label_of(len(curves)), colour))
    return ends, sorted(ticks)
