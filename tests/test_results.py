# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from datetime import date

import pytest
import torch

from alter_peft import __version__
from alter_peft.evaluation import Result, Score
from alter_peft.evaluation.results import environment, machine


RESULT = Result(
    name="alter",
    seed=1,
    scores={"forget/rouge": Score(0.25, [0.0, 0.5]), "utility/model_utility": Score(0.4, [])},
    curves={"relearning/forget/rouge": [(0.0, 0.25), (10.0, 0.75)]},
    seconds={"training": 12.5},
    settings={"r": 8, "router": "context", "layers": [12, 13]},
    environment={"machine": "a test", "date": "2026-11-26"},
    machine="a test",
)


def test_a_result_comes_back_as_it_was_saved(tmp_path):
    RESULT.save(tmp_path / "alter-1" / "result.json")
    found = Result.load(tmp_path / "alter-1" / "result.json")
    assert found == RESULT
    assert isinstance(found.scores["forget/rouge"], Score)
    assert found.curves["relearning/forget/rouge"][1] == (10.0, 0.75)
    assert [path.name for path in (tmp_path / "alter-1").iterdir()] == ["result.json"]


def test_the_file_is_plain_json(tmp_path):
    RESULT.save(tmp_path / "result.json")
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["scores"]["forget/rouge"] == {"value": 0.25, "rows": [0.0, 0.5]}
    assert data["curves"] == {"relearning/forget/rouge": [[0.0, 0.25], [10.0, 0.75]]}
    assert data["error"] is None


def test_a_failed_cell_says_so(tmp_path):
    Result("lora_ga", 0, error="ValueError: `lr` is nan").save(tmp_path / "result.json")
    found = Result.load(tmp_path / "result.json")
    assert found.error == "ValueError: `lr` is nan" and found.scores == {} and found.failed
    assert not Result("lora_ga", 0, error="stopped before: evaluation").failed


def test_numbers_without_end_come_back(tmp_path):
    Result("x", 0, {"a/b": Score(math.inf, [-math.inf])}).save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").scores == {"a/b": Score(math.inf, [-math.inf])}


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
