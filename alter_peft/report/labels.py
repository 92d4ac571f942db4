# SPDX-License-Identifier: Apache-2.0
"""Names written into a picture beside what they name, where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


LEADER: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.7}
# where a label may stand, seen from its point: right, up
SIDES = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))


class Label(NamedTuple):
    """A text that belongs to a point of a picture, in its data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def label_points(axes: Axes, labels: Sequence[Label], avoided: Sequence[Artist]) -> None:
    """Write each label beside its point, as near as it covers neither another label nor a point nor what to avoid."""
    from matplotlib.transforms import Bbox

    figure: Any = axes.get_figure()
    figure.draw_without_rendering()
    pixels = figure.dpi / 72  # a point
    lines: Any = axes.get_lines()
    dots = [axes.transData.transform(point) for line in lines for point in line.get_xydata()]
    taken = [Bbox.from_bounds(x - 5 * pixels, y - 5 * pixels, 10 * pixels, 10 * pixels) for x, y in dots]
    taken += [artist.get_window_extent() for artist in avoided]
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        text = axes.text(0, 0, label.text, fontsize=10)
        size = text.get_window_extent()
        text.remove()
        for distance, (right, up) in product((9, 22, 36, 52, 70), SIDES):
            left = x + right * distance * pixels - size.width * (1 - right) / 2
            bottom = y + up * distance * pixels - size.height * (1 - up) / 2
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            inside = (
                axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            )
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        axes.annotate(
            label.text,
            (label.x, label.y),
            (right * distance, up * distance),
            textcoords="offset points",
            ha={1: "left", 0: "center", -1: "right"}[right],
            va={1: "bottom", 0: "center", -1: "top"}[up],
            color=label.colour,
            fontsize=10,
            arrowprops={**LEADER, "color": label.colour} if distance > 9 else None,
        )


def label_ends(axes: Axes, ends: Sequence[Label]) -> None:
    """Write each label to the right of the axes at the height where its lines end, pushed apart where they meet."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end.y)
    heights = [(label.y - low) / (high - low) for label in ordered]
    gap = 0.06
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 0:
                heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
    for label, height in zip(ordered, heights, strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            color=label.colour,
            fontsize=10,
            annotation_clip=False,
            arrowprops={**LEADER, "color": label.colour, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 6},
        )
