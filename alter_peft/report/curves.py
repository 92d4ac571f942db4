# SPDX-License-Identifier: Apache-2.0
"""Pictures of what is measured more than once: curves by step of relearning or by request."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from alter_peft.evaluation.metrics import METRICS
from alter_peft.evaluation.results import ORACLE
from alter_peft.evaluation.scores import Key, Scores

from .drawing import COLOURS, SPECIAL, Figure, new_axes, save, style, without
from .request_table import FORGOTTEN, after_requests, requests_of
from .summary import Benchmark, Model


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# sets whose curves over requests one after another are drawn as lines; `plot_requests` has each request by itself
OF_REQUESTS = ("retain", "utility", FORGOTTEN)


def plot_curves(benchmark: Benchmark, folder: Path) -> list[Figure]:
    """One picture a curve, and for each method that was given requests one of them all."""
    curves = dict.fromkeys(key._replace(step=None) for key in benchmark.keys if key.step is not None)
    figures = []
    for curve in curves:
        if curve.attack is not None or curve.set in OF_REQUESTS:
            parts = (curve.attack, curve.set, curve.metric) if curve.attack else ("requests", curve.set)
            figures.append(plot_curve(benchmark, curve, folder / f"{'-'.join(parts).replace(' ', '-')}.png"))
    for model in benchmark.measured:
        figure = plot_requests(model, folder / f"requests-each-{model.name}.png")
        figures += [] if figure is None else [figure]
    return figures


def plot_requests(model: Model, path: Path) -> Figure | None:
    """What is left of each request after each: rows are what was asked to be forgotten, columns how many were made."""
    requests = requests_of(after_requests(model))
    if not requests:
        return None
    counts = sorted({count for curve in requests.values() for count in curve})
    values = [[curve[count].mean if count in curve else math.nan for count in counts] for curve in requests.values()]
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


def plot_curve(benchmark: Benchmark, curve: Key, path: Path) -> Figure:
    """
    One curve of every model that has it, a line a seed: relearning by step, or what requests one after another leave
    (as the paper's Fig. 5). `curve` is the key of its points without their step.
    """
    of_requests = curve.attack is None
    axes = new_axes()
    ticks = _draw_curves(axes, benchmark, curve)
    level = benchmark.oracle.estimate(Key("forget", "probability")) if of_requests and curve.set == FORGOTTEN else None
    if level is not None:
        axes.axhline(level.mean, color=SPECIAL[ORACLE], linestyle="--", linewidth=1.6, label=benchmark.oracle.label)
    if not of_requests:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0], ticks[-1] if len(ticks) > 1 else ticks[0] + 1)
    is_probability = of_requests or curve.metric == "probability"
    is_share = is_probability or (curve.metric in METRICS and METRICS[curve.metric].range == (0.0, 1.0))
    axes.set_ylim(0, 1.02 if is_share else 1.1 * axes.dataLim.y1)
    axes.set_xlabel("requests so far" if of_requests else "steps of relearning")
    axes.set_ylabel(f"{'answer probability' if is_probability else curve.metric} ({curve.set})")
    save(axes, path, legend=True)
    models = benchmark.methods if of_requests else benchmark.measured
    missing = [cell for model in models for cell in model.results if not _points(cell.scores, curve)]
    dashed = level is not None or any(_points(cell.scores, curve) for cell in benchmark.oracle.results)
    caption = f"Each line is a seed{'; the oracle is dashed' if dashed else ''}." + without(missing, "such curve")
    title = "Requests" if curve.attack is None else curve.attack.replace("_", " ").capitalize()
    return Figure(f"{title}: {curve.set}", caption, path)


def _points(scores: Scores, curve: Key) -> list[tuple[float, float]]:
    """Step and value, by step."""
    found = {key.step: score.value for key, score in scores.items() if key._replace(step=None) == curve}
    return sorted((step, value) for step, value in found.items() if step is not None)


def _draw_curves(axes: Axes, benchmark: Benchmark, curve: Key) -> list[float]:
    """A line a seed; all places on the horizontal axis."""
    ticks = set()
    for model in benchmark.measured:
        curves = [points for cell in model.results if (points := _points(cell.scores, curve))]
        colour, marker = style(benchmark, model)
        dashes = "--" if model.name == ORACLE else "-"
        for number, points in enumerate(curves):
            axes.plot(
                *zip(*points, strict=True), dashes, color=colour, marker=marker, markersize=5, linewidth=1.6,
                clip_on=False, label=None if number else model.label_of(len(curves)),
            )  # fmt: skip
            ticks |= {x for x, _ in points}
    return sorted(ticks)
