# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/extending.md, followed: all that they register goes through one benchmark of a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import make_llama
from peft import PeftConfig
from trainer_setup import forget_rows, retain_rows

from alter_peft.benchmark.methods import METHODS
from alter_peft.cli import main
from alter_peft.evaluation import Key, Result
from alter_peft.evaluation.attacks import ATTACKS
from alter_peft.evaluation.metrics import METRICS
from alter_peft.evaluation.tasks import TASKS
from alter_peft.losses import FORGET_LOSSES
from alter_peft.tuner.router import ROUTERS


PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
REGISTRIES = {
    "squared": FORGET_LOSSES, "answer_words": METRICS, "shouting": ATTACKS, "homes": TASKS, "unit_context": ROUTERS,
    "alter_squared": METHODS,
}  # fmt: skip


@pytest.fixture
def followed(monkeypatch, tmp_path):
    """What the page's blocks register, and nothing of it afterwards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    before = [(registry, set(registry)) for registry in REGISTRIES.values()]
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(block, {})
    yield {name for registry, known in before for name in set(registry) - known}
    for registry, known in before:
        for name in set(registry) - known:
            del registry[name]


def test_all_recipes_in_one_benchmark(followed, tokenizer, tmp_path, capsys):
    assert followed == set(REGISTRIES)
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {
        name: [(row["prompt"], row["completion"]) for row in of_set]
        for name, of_set in (("forget", forget_rows()), ("retain", retain_rows()))
    }
    (tmp_path / "homes.json").write_text(json.dumps(rows))
    quick = {"max_steps": 2, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-2}
    grid = {
        "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "oracle_seeds": [0, 1],
        "methods": ["alter_squared"], "attacks": ["shouting"], "max_new_tokens": 3,
        "task_data": {"homes": {"file": str(tmp_path / "homes.json")}},
        "options": {
            "teach": {**quick, "warmup_steps": 0, "per_device_train_batch_size": 2},
            "alter_squared": {**quick, "forget_loss_kwargs": {"scale": 2.0}},
        },
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    main(["benchmark", "--config", str(tmp_path / "grid.yaml")])
    result = Result.load(tmp_path / "out" / "alter_squared-0" / "result.json")
    assert result.error is None
    assert {Key("forget", "answer_words"), Key("forget", "probability", "shouting")} <= result.scores.keys()
    adapter = PeftConfig.from_pretrained(tmp_path / "out" / "alter_squared-0")
    assert adapter.router == "unit_context"
    trained = (tmp_path / "out" / "alter_squared-0" / "README.md").read_text()
    assert "squared" in trained  # the card says by which loss
    assert "| alter_squared | " in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "answer_words: words of the model's own answer, in words." in report and "shouting" in report
    place = tmp_path / "out" / "mine-0" / "result.json"
    asked = ["--model", str(tmp_path / "out" / "target" / "model"), "--output_file", str(place), "--name", "mine"]
    asked += ["--adapter", str(tmp_path / "out" / "alter_squared-0"), "--max_new_tokens", "3", "--attacks", "shouting"]
    main(["evaluate", *asked, "--task_data", json.dumps(grid["task_data"])])
    assert Result.load(place).scores.keys() <= result.scores.keys()
    main(["report", str(tmp_path / "out")])  # which refuses what was measured otherwise
    assert "| mine | " in capsys.readouterr().out


def test_each_recipe_is_short():
    recipes = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(recipes) == len(REGISTRIES) and all(len(recipe.splitlines()) <= 30 for recipe in recipes)
