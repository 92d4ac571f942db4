# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from made_up_benchmark import make_benchmark, relearning, save, scores

from alter_peft.evaluation import Score
from alter_peft.evaluation.figures import COLOURS, write_figures
from alter_peft.evaluation.reading import read_benchmark


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def drawn(folder, output):
    """name -> figure and picture (height, width, RGB in 0..255)."""
    output.mkdir()
    figures = write_figures(read_benchmark(folder), output)
    assert len({figure.path for figure in figures}) == len(figures) == len(list(output.iterdir()))
    return {figure.path.stem: (figure, read(figure.path)) for figure in figures}


def read(path):
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def ink(picture, colour):
    """Where a colour was drawn: rows and columns of its pixels."""
    return np.argwhere((picture == np.round(np.multiply(matplotlib.colors.to_rgb(colour), 255))).all(axis=-1))


def test_figures_of_what_there_is(folder, tmp_path):
    found = drawn(folder, tmp_path / "figures")
    assert list(found) == ["plane", "time", "relearn_half-held_out-probability", "experts"]
    for _, picture in found.values():
        assert picture.shape[1] > 800 and len(ink(picture, "#000000"))
    for name in ("plane", "time", "relearn_half-held_out-probability"):
        for colour in COLOURS[:2]:  # one a method
            assert len(ink(found[name][1], colour)) > 100, name
        assert "Without" not in found[name][0].caption


def test_a_point_moves_with_its_scores(folder, tmp_path):
    before = drawn(folder, tmp_path / "before")
    save(folder, "lora", 1, scores=scores(0.3, 0.54), seconds={"training": 30}, curves=relearning(0.3, 0.5, 0.9))
    after = drawn(folder, tmp_path / "after")
    for name in ("plane", "time"):
        there, now = (ink(found[name][1], COLOURS[1]).mean(axis=0) for found in (before, after))
        assert now[1] > there[1] + 100, name  # to the right: more probability, more seconds
    assert (
        ink(after["plane"][1], COLOURS[1]).mean(axis=0)[0] < 0.5 * ink(before["plane"][1], COLOURS[1]).mean(axis=0)[0]
    )


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
    picture = drawn(folder, output)["relearn_half-held_out-probability"][1]
    found = ink(picture, COLOURS[1])
    return found[found[:, 1] < 0.7 * picture.shape[1]]  # without the label


def test_what_is_missing_is_said(folder, tmp_path):
    save(folder, "lora", 1, scores=scores(0.0, 0.2), without=["utility/model_utility"])
    found = drawn(folder, tmp_path / "figures")
    captions = {name: figure.caption for name, (figure, _) in found.items()}
    assert captions["plane"].endswith("Without lora of seed 1: no such score.")
    assert captions["time"].endswith("Without lora of seed 1: no seconds, or no finite distance in every score.")
    assert captions["relearn_half-held_out-probability"].endswith("Without lora of seed 1: no such curve.")


def test_requests(folder, tmp_path):
    curves = {
        "requests/retain": [(0, 0.9), (1, 0.85), (2, 0.8)],
        "requests/forgotten": [(1, 0.2), (2, 0.15)],
        "requests/open": [(0, 0.9), (1, 0.9)],
        "requests/request 1": [(0, 0.9), (1, 0.2), (2, 0.2)],
    }
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves=curves)
    found = drawn(folder, tmp_path / "figures")
    assert [name for name in found if name.startswith("requests")] == ["requests-retain", "requests-forgotten"]
    for name in ("requests-retain", "requests-forgotten"):
        assert found[name][0].caption.endswith("Without alter of seed 1, lora of seed 1: no such curve.")
    black = {name: len(ink(found[name][1], "#000000")) for name in ("requests-retain", "requests-forgotten")}
    assert black["requests-forgotten"] > black["requests-retain"] + 500  # the oracle's level


def test_one_request(folder, tmp_path):
    save(folder, "alter", 0, scores=scores(0.1, 0.5), curves={"requests/forgotten": [(1, 0.2)]})
    assert "requests-forgotten" in drawn(folder, tmp_path / "figures")


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
        found = {f"{books}/verbmem": Score(value, []) for books in ("forget", "retain")}
        save(tmp_path / "books", name, seed, scores=found)
        save(tmp_path / "choices", name, seed, scores={"wmdp_bio/acc": Score(value, [])})
    assert list(drawn(tmp_path / "books", tmp_path / "a")) == ["plane"]
    assert list(drawn(tmp_path / "choices", tmp_path / "b")) == []
