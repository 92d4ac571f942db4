# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from datetime import date

import pytest
import torch

from alter_peft import __version__
from alter_peft.evaluation.results import Result, environment, machine
from alter_peft.evaluation.scores import Key, Score, Scores


RESULT = Result(
    name="alter",
    seed=1,
    scores=Scores(
        [
            Score("forget", "rouge", 0.25, [0.0, 0.5], settings={"answered": 2}),
            Score("utility", "model_utility", 0.4, average="other"),
            Score("trained half", "rouge", 0.75, [0.75], attack="relearning", step=10),
        ]
    ),
    seconds={"training": 12.5},
    settings={"r": 8, "router": "context", "layers": [12, 13]},
    environment={"machine": "a test", "date": "2026-11-26"},
    machine="a test",
)


def test_a_result_comes_back_as_it_was_saved(tmp_path):
    RESULT.save(tmp_path / "alter-1" / "result.json")
    found = Result.load(tmp_path / "alter-1" / "result.json")
    assert found == RESULT
    assert found.scores.of("forget", "rouge").settings == {"answered": 2}
    assert found.scores.of("trained half", "rouge", "relearning", 10).value == 0.75
    assert [path.name for path in (tmp_path / "alter-1").iterdir()] == ["result.json"]


def test_the_file_is_plain_json(tmp_path):
    RESULT.save(tmp_path / "result.json")
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["scores"][0] == {
        "set": "forget", "metric": "rouge", "value": 0.25, "rows": [0.0, 0.5], "average": "mean", "attack": None,
        "step": None, "settings": {"answered": 2},
    }  # fmt: skip
    assert list(data)[:3] == ["name", "seed", "scores"]
    assert data["error"] is None


def test_a_failed_cell_says_so(tmp_path):
    Result("lora_ga", 0, error="ValueError: `lr` is nan").save(tmp_path / "result.json")
    found = Result.load(tmp_path / "result.json")
    assert found.error == "ValueError: `lr` is nan" and found.scores == {} and found.failed
    assert not Result("lora_ga", 0, error="stopped before: evaluation").failed


def test_numbers_without_end_come_back(tmp_path):
    scores = Scores([Score("a", "b", math.inf, [-math.inf]), Score("a", "c", 1.0, [math.nan]), Score("a", "d", 1.0)])
    Result("x", 0, scores).save(tmp_path / "result.json")
    found = Result.load(tmp_path / "result.json")
    assert found.scores.of("a", "b") == Score("a", "b", math.inf, [-math.inf])
    assert found.broken == [Key("a", "b"), Key("a", "c")]


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "x", "seed": 0, "scores": {"a/b": {"value": 1}}}'])
def test_another_file_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"is no result \(it has no list of `scores`\)\. Remove it, and measure"):
        Result.load(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ({"value": None}, r"`a/b` is None with rows"),
        ({"rows": None}, "must be an iterable"),
        ({"rows": ["high"]}, "rows that are not all numbers"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_score_that_is_none_is_named_with_its_file(tmp_path, score, reason):
    data = {"name": "x", "seed": 0, "scores": [{"set": "a", "metric": "b", "value": 0.5, **score}]}
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"result.json' is no result \(.*{reason}.*\)\. Remove it"):
        Result.load(tmp_path / "result.json")


def test_saving_again_replaces_the_file_whole(tmp_path):
    """What can't be written leaves the earlier result alone."""
    RESULT.save(tmp_path / "result.json")
    with pytest.raises(TypeError, match="not JSON serializable"):
        Result("alter", 2, settings={"model": object()}).save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == RESULT
    Result("alter", 3).save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").seed == 3


def test_the_machine_is_filled_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine() == Result("x", 0).machine and machine().endswith(f", {torch.get_num_threads()} threads")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert Result("x", 0).machine == "a GPU"


def test_the_environment_says_when_and_with_what():
    found = environment()
    assert found["date"] == date.today().isoformat() and found["torch"] == torch.__version__
    assert found["alter_peft"] == __version__
