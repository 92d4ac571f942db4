# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from alter_peft.report.labels import Label, label_ends, label_points


@pytest.fixture
def axes():
    figure = Figure(figsize=(7.5, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return axes


def boxes(axes):
    """Text -> where it stands, in pixels."""
    axes.get_figure().draw_without_rendering()
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    return {text.get_text(): Text.get_window_extent(text) for text in texts}


def test_labels_of_near_points_cover_nothing(axes):
    places = [(0.5, 0.5), (0.51, 0.5), (0.5, 0.51), (0.98, 0.98), (0.02, 0.02)]
    axes.plot(*zip(*places, strict=True), "o")
    box = axes.bar([0.6], [0.1], width=0.1, bottom=0.45).patches[0]
    label_points(axes, [Label(x, y, f"method {i}", "black") for i, (x, y) in enumerate(places)], [box])
    found = boxes(axes)
    assert list(found) == [f"method {i}" for i in range(5)]
    assert not any(one.overlaps(other) for one, other in combinations(found.values(), 2))
    for place in axes.transData.transform(places):
        assert not any(one.contains(*place) for one in found.values())
    assert not any(one.overlaps(box.get_window_extent()) for one in found.values())
    for one in found.values():
        assert axes.bbox.contains(one.x0, one.y0) and axes.bbox.contains(one.x1, one.y1)


def test_labels_of_lines_that_meet_are_pushed_apart_in_their_order(axes):
    ends = {"b": 0.501, "c": 0.502, "a": 0.5, "top": 0.9}
    label_ends(axes, [Label(1.0, y, name, "black") for name, y in ends.items()])
    found = boxes(axes)
    assert not any(one.overlaps(other) for one, other in combinations(found.values(), 2))
    assert found["a"].y0 < found["b"].y0 < found["c"].y0 < found["top"].y0
    middle = axes.transData.transform((1, 0.501))[1]
    assert (found["b"].y0 + found["b"].y1) / 2 == pytest.approx(middle, abs=3)
    assert all(one.x0 > axes.bbox.x1 for one in found.values())
