# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from itertools import combinations

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from made_up_benchmark import curve, make_benchmark, named, relearning, save, scores

from alter_peft.benchmark.methods import DEFAULT_METHODS
from alter_peft.report import curves, drawing, figures
from alter_peft.report.drawing import COLOURS, MARKERS, SPECIAL, style
from alter_peft.report.reading import read_benchmark


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def drawn(folder, output):
    """name -> figure and picture (height, width, RGB in 0..255)."""
    output.mkdir()
    found = figures.write_figures(read_benchmark(folder), output)
    assert len({figure.path for figure in found}) == len(found) == len(list(output.iterdir()))
    return {figure.path.stem: (figure, read(figure.path)) for figure in found}


def read(path):
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def ink(picture, colour):
    """Where a colour was drawn: rows and columns of its pixels."""
    return np.argwhere((picture == np.round(np.multiply(matplotlib.colors.to_rgb(colour), 255))).all(axis=-1))


def of_axes(picture, colour):
    """The same without the legend."""
    found = ink(picture, colour)
    return found[found[:, 1] < 0.7 * picture.shape[1]]


def test_figures_of_what_there_is(folder, tmp_path):
    found = drawn(folder, tmp_path / "figures")
    assert list(found) == ["plane", "time", "relearning-held-out-half-probability", "experts"]
    for _, picture in found.values():
        assert picture.shape[1] > 800 and len(ink(picture, "#000000"))
    for name in ("plane", "time", "relearning-held-out-half-probability"):
        for colour in COLOURS[:2]:  # one a method
            assert len(ink(found[name][1], colour)) > 100, name
        assert "Without" not in found[name][0].caption


def test_every_method_has_a_look_of_its_own(folder):
    for name in (*DEFAULT_METHODS, *(f"mine {number}" for number in range(40))):
        save(folder, name, 0, scores=scores(0.1, 0.5))
    benchmark = read_benchmark(folder)
    looks = {model.name: style(benchmark, model) for model in benchmark.models}
    assert len(set(looks.values())) == len(looks) > 40
    benchmark.models = [model for model in benchmark.models if model.name in DEFAULT_METHODS]
    colours, markers = zip(*(style(benchmark, model) for model in benchmark.models), strict=True)
    assert len(set(markers)) == min(len(DEFAULT_METHODS), len(MARKERS))
    assert len(set(colours)) == min(len(DEFAULT_METHODS), len(COLOURS))


# linear RGB as those without one of the cones see it (Machado et al., 2009, severity 1)
SEEN = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.mark.parametrize("sight", SEEN)
def test_colours_are_told_apart_and_read_on_white(sight):
    """CIELAB distance; 2.3 is just noticeable."""
    colours = [*COLOURS, *SPECIAL.values()]
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert (1.05 / (linear @ XYZ[1] + 0.05)).min() > 3  # contrast as in WCAG
    xyz = (linear @ np.transpose(SEEN[sight])).clip(0, 1) @ XYZ.T / XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    assert min(np.linalg.norm(one - other) for one, other in combinations(lab, 2)) > 12


def test_a_point_moves_with_its_scores(folder, tmp_path):
    before = drawn(folder, tmp_path / "before")
    save(folder, "lora", 1, scores=scores(0.3, 0.54), seconds={"training": 30}, curves=relearning(0.3, 0.5, 0.9))
    after = drawn(folder, tmp_path / "after")
    for name in ("plane", "time"):
        there, now = (of_axes(found[name][1], COLOURS[1]).mean(axis=0) for found in (before, after))
        assert now[1] > there[1] + 100, name  # to the right: more probability, more seconds
    heights = [of_axes(found["plane"][1], COLOURS[1]).mean(axis=0)[0] for found in (before, after)]
    assert heights[1] < 0.5 * heights[0]


def test_the_oracles_band_has_its_size(folder, tmp_path):
    before = drawn(folder, tmp_path / "before")["plane"][1]
    for seed, step in enumerate((-0.05, 0.0, 0.05)):
        save(folder, "oracle", seed, scores=scores(0.1 + step, 0.5 + step, step))
    after = drawn(folder, tmp_path / "after")["plane"][1]
    areas = [len(ink(picture, "#DDDDDD")) for picture in (before, after)]  # black at 2/15 on white
    assert areas[1] > 5 * areas[0] > 0


def test_curves_end_where_they_should(folder, tmp_path):
    low, high = (
        drawn_curve(folder, tmp_path / name, value) for name, value in (("low", 0.2), ("high", 0.95))
    )  # the top of the line is further up
    assert high[:, 0].min() < low[:, 0].min() - 100


def drawn_curve(folder, output, last):
    save(folder, "lora", 1, scores=scores(0.0, 0.2, 0.4), curves=relearning(0.0, 0.1, last))
    return of_axes(drawn(folder, output)["relearning-held-out-half-probability"][1], COLOURS[1])


def test_what_is_missing_is_said(folder, tmp_path):
    save(folder, "lora", 1, scores=scores(0.0, 0.2), without=["utility/model_utility"])
    found = drawn(folder, tmp_path / "figures")
    captions = {name: figure.caption for name, (figure, _) in found.items()}
    assert captions["plane"].endswith("Without lora of seed 1: no such score.")
    assert captions["time"].endswith("Without lora of seed 1: no seconds, or no finite distance in every score.")
    assert captions["relearning-held-out-half-probability"].endswith("Without lora of seed 1: no such curve.")


def test_the_legend_counts_the_seeds_that_are_drawn(folder, tmp_path, monkeypatch):
    legends = []

    def saved(axes, path, **options):
        drawing.save(axes, path, **options)
        legends.append(axes.get_legend())

    for module in (figures, curves):
        monkeypatch.setattr(module, "save", saved)
    save(folder, "oracle", 2, scores=scores(0.11, 0.51, 0.01), seconds={"training": 20})
    save(folder, "alter", 1, scores=scores(0.1, 0.5), seconds={"training": 9}, without=["utility/model_utility"])
    figures.write_figures(read_benchmark(folder), tmp_path)
    plane, time, relearned, _ = ([text.get_text() for text in legend.get_texts()] for legend in legends)
    assert plane == ["oracle (3 seeds)", "target", "alter (1 of 2 seeds)", "lora (1 of 2 seeds)"]
    assert time == ["alter (1 of 2 seeds)", "lora (1 of 2 seeds)", "oracle (3 seeds)"]
    assert relearned == ["target", "oracle (2 of 3 seeds)", "alter (1 of 2 seeds)", "lora (1 of 2 seeds)"]


def test_a_utility_of_0_is_explained_in_the_plane(folder, tmp_path):
    assert "Model utility is 0" not in drawn(folder, tmp_path / "before")["plane"][0].caption
    save(folder, "alter", 0, scores=scores(0.1, 0.0, retain__rouge=0.5, real_authors__rouge=0.0))
    save(folder, "lora", 1, scores=scores(0.1, 0.0, world_facts__rouge=0.0))
    assert drawn(folder, tmp_path / "after")["plane"][0].caption.endswith(
        " Model utility is 0 where one of its nine scores is: of alter (2 seeds) real_authors/rouge; of lora "
        "(1 of 2 seeds) world_facts/rouge."
    )


def test_seconds_of_other_machines_are_no_comparison(folder, tmp_path):
    caption = drawn(folder, tmp_path / "before")["time"][0].caption
    assert caption.endswith(" Machine: 2 CPU threads.") and "no comparison" not in caption
    path = folder / "alter-1" / "result.json"
    path.write_text(path.read_text().replace("2 CPU threads", "1 CPU threads"))
    assert drawn(folder, tmp_path / "after")["time"][0].caption.endswith(
        " Seconds of different machines or threads are no comparison: 2 CPU threads (alter of seed 0, lora of seed "
        "1); 1 CPU threads (alter of seed 1)."
    )
    for name in ("alter-1", "alter-0", "lora-1"):  # requests taken up elsewhere; the last one's machine is `machine`
        path = folder / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"machines": {"training": "a laptop, a server"}}))
    assert drawn(folder, tmp_path / "parts")["time"][0].caption.endswith(" Machine: a laptop, a server.")


def test_requests(folder, tmp_path):
    found = [
        *curve("retain", {0: 0.9, 1: 0.85, 2: 0.8}),
        *curve("forgotten so far", {1: 0.2, 2: 0.15}),
        *curve("still to come", {0: 0.9, 1: 0.9}),
        *curve("request 1", {0: 0.9, 1: 0.2, 2: 0.2}),
    ]
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves=found)
    found = drawn(folder, tmp_path / "figures")
    names = ["requests-retain", "requests-forgotten-so-far"]
    assert [name for name in found if name.startswith("requests")] == [*names, "requests-each-alter"]
    for name in names:
        assert ("oracle is dashed" in found[name][0].caption) == (name == "requests-forgotten-so-far")
        assert found[name][0].caption.endswith("Without alter of seed 1, lora of seed 1: no such curve.")
    black = {name: len(ink(found[name][1], "#000000")) for name in names}
    assert black["requests-forgotten-so-far"] > black["requests-retain"] + 500  # the oracle's level


def test_each_request_darkens_with_what_is_left_of_it(folder, tmp_path):
    names = ("low", "high")
    for name, value in zip(names, (0.0, 1.0), strict=True):
        found = [*curve("request 1", {0: 1.0, 1: value}), *curve("request 2", {0: 1.0, 1: 1.0, 2: 0.0})]
        for seed in (0, 1):
            save(folder, "alter", seed, scores=scores(0.1, 0.5), curves=found)
        figure, picture = drawn(folder, tmp_path / name)["requests-each-alter"]
        full, empty = (len(ink(picture, colour)) for colour in ("#08306B", "#F7FBFF"))
        assert figure.title == "Each request: alter (2 seeds)" and len(ink(picture, COLOURS[1])) > 100
        assert (full > 3 * empty) == (value == 1.0)  # four fields of 1 and one of 0, or three and two


def test_one_request(folder, tmp_path):
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves=curve("forgotten so far", {1: 0.2}))
    assert "requests-forgotten-so-far" in drawn(folder, tmp_path / "figures")


def test_shares_of_experts(folder, tmp_path):
    mostly = drawn(folder, tmp_path / "before")["experts"][1]
    for seed in (0, 1):
        shares = {"forget__expert_0": 0.75, "forget__expert_1": 0.25}
        save(folder, "alter", seed, scores=scores(0.1, 0.5, **shares))
    hardly = drawn(folder, tmp_path / "after")["experts"][1]
    areas = [len(ink(picture, COLOURS[0])) for picture in (mostly, hardly)]
    assert areas[1] == pytest.approx(areas[0] * 0.25 / 0.9, rel=0.05)


def test_more_experts_than_colours(folder, tmp_path):
    shares = {f"forget__expert_{expert}": 0.1 for expert in range(10)}
    save(folder, "alter", 0, scores=scores(0.1, 0.5, **shares))
    assert "experts" in drawn(folder, tmp_path / "figures")


def test_many_methods_at_one_place(folder, tmp_path):
    for number in range(8):
        save(
            folder,
            f"method {number}",
            0,
            scores=scores(0.1, 0.5),
            seconds={"training": 10},
            curves=relearning(0, 1, 1),
        )
    assert len(drawn(folder, tmp_path / "figures")) == 4


def test_books_and_what_has_no_plane(tmp_path):
    for name, seed, value in (("target", 0, 0.9), ("oracle", 0, 0.25), ("oracle", 1, 0.35), ("alter", 0, 0.3)):
        save(tmp_path / "books", name, seed, scores=named(forget__verbmem=value, retain__verbmem=value))
        save(tmp_path / "choices", name, seed, scores=named(wmdp_bio__acc=value))
    assert list(drawn(tmp_path / "books", tmp_path / "a")) == ["plane"]
    assert list(drawn(tmp_path / "choices", tmp_path / "b")) == []
