# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/extending.md, followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_llama
from peft import PeftModel
from trainer_setup import forget_rows, retain_rows

from alter_peft.benchmark.methods import METHODS, UnlearningData, read_options
from alter_peft.losses import FORGET_LOSSES


PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def followed(monkeypatch, tmp_path):
    """What the page's blocks register, and nothing of it afterwards."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    before = [(registry, set(registry)) for registry in (FORGET_LOSSES, METHODS)]
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(block, {})
    yield {name for registry, known in before for name in set(registry) - known}
    for registry, known in before:
        for name in set(registry) - known:
            del registry[name]


def test_a_loss_and_a_method_are_an_entry_each(followed, tokenizer, tmp_path):
    assert followed == {"squared", "lora_squared"}
    data = UnlearningData(forget_rows().remove_columns("domain"), retain_rows())
    options = read_options("lora_squared", {"max_steps": 2, "bf16": False, "disable_tqdm": True, "logging_steps": 1})
    model = METHODS["lora_squared"].run(make_llama(len(tokenizer)), tokenizer, data, tmp_path / "run", 0, options)
    assert isinstance(model, PeftModel) and (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_each_recipe_is_short():
    recipes = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    assert len(recipes) == 2 and all(len(recipe.splitlines()) <= 30 for recipe in recipes)
