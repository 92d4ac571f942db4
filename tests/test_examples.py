# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are printed, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import make_llama

from alter_peft.cli import main


EXAMPLES = Path(__file__).parents[1] / "examples"


def save_tiny_model(tokenizer, folder):
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_quickstart_is_the_readmes_snippet():
    snippet = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)[0]
    assert (EXAMPLES / "quickstart.py").read_text().endswith(snippet)


def test_readme_code(tokenizer, tmp_path):
    """The README's Python, on a tiny model and for two steps."""
    model = save_tiny_model(tokenizer, tmp_path / "base")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL))
    assert "AlterUnlearnTrainer(" in code and "AutoPeftModelForCausalLM" in code
    for before, after in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", model),
        ('output_dir="adapter"', 'output_dir="adapter", max_steps=2'),
    ):
        assert before in code
        code = code.replace(before, after)
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_unlearn_yaml(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(EXAMPLES.parent)
    model = save_tiny_model(tokenizer, tmp_path / "base")
    output = str(tmp_path / "out")
    options = yaml.safe_load((EXAMPLES / "unlearn.yaml").read_text())
    assert {"model", "forget", "retain", "output_dir"} <= set(options)
    flags = [
        "--model",
        model,
        "--output_dir",
        output,
        "--max_steps",
        "2",
        "--bf16",
        "false",
        "--dataloader_pin_memory",
        "false",
    ]
    main(["unlearn", "--config", "examples/unlearn.yaml", *flags, "--disable_tqdm", "true", "--force"])
    assert f"adapter: {output}" in capsys.readouterr().out
