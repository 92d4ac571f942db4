# SPDX-License-Identifier: Apache-2.0
"""Whatever is put into `adapter_config.json`: an error that names the field, or the adapter that the file describes.

Not of `peft_type`, and not of files that are no JSON object: PEFT reads these before ALTER is asked.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from alter_peft import AlterConfig


IDS = torch.arange(2, 14)[None]
FIELDS = sorted(field.name for field in fields(AlterConfig) if field.name != "peft_type")
TEXTS = st.sampled_from(
    ["", "context", "static", "q_proj", "all-linear", "none", "base", "CAUSAL_LM", "é", "[", "a" * 99]
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 2, 3, 0.5, math.nan, math.inf, -math.inf])
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)
MANY = {
    "deadline": None, "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("fuzzed")
    for router in ("context", "static"):
        torch.manual_seed(0)
        config = AlterConfig(domains=["a", "b"], r=2, init_weights=False, target_modules=["q_proj"], router=router)
        get_peft_model(make_llama(32, num_hidden_layers=2), config).save_pretrained(place / router)
    return {router: place / router for router in ("context", "static")}


def load(folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="Unexpected keyword arguments")
        return PeftModel.from_pretrained(make_llama(32, num_hidden_layers=2), folder).eval()


def plain(value: Any) -> Any:
    """What a set or tuple is saved as, in any order."""
    return sorted(map(repr, value)) if isinstance(value, (list, set, tuple)) else repr(value)


def check(source: Path, folder: Path, changes: dict[str, Any], removed: set[str]) -> None:
    """What comes of an adapter whose config is changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    changed = {**json.loads(path.read_text()), **changes}
    changed = {name: value for name, value in changed.items() if name not in removed}
    path.write_text(json.dumps(changed))
    try:
        model = load(folder)
    except (ValueError, TypeError, UserWarning) as error:
        text = str(error)
        named = [name for name in changes.keys() | removed if name in text or name.replace("_", " ") in text.lower()]
        assert named or "missing adapter keys" in text, f"{changes}, {removed}: {text}"
        return
    config = model.peft_config["default"].to_dict()
    for name, value in changed.items():
        if value is None or (value in ([], {}) and name in ("modules_to_save", "trainable_token_indices")):
            continue  # none
        if name in config and name not in ("inference_mode", "peft_type", "weights_sha256"):
            listed = [value] if name == "layers_to_transform" and isinstance(value, int) else value
            assert plain(config[name]) in (plain(value), plain(listed)), name
    with torch.no_grad():
        model(IDS)


@settings(max_examples=100, **MANY)
@given(router=st.sampled_from(["context", "static"]), name=st.sampled_from(FIELDS), value=VALUES)
def test_a_field_of_any_value(adapters, tmp_path, router, name, value):
    check(adapters[router], tmp_path / "out", {name: value}, set())


@settings(max_examples=30, **MANY)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    removed=st.sets(st.sampled_from(FIELDS), max_size=3),
)
def test_several_fields_changed_or_missing(adapters, tmp_path, changes, removed):
    check(adapters["context"], tmp_path / "out", changes, removed)


@pytest.mark.parametrize(
    "name, value",
    [
        ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1, 2]), ("target_modules", [[1]]),
        ("exclude_modules", True), ("layers_pattern", 0.5), ("r", 2**70), ("temperature_low", 2**70),
        ("modules_to_save", [1]), ("trainable_token_indices", {"": [1]}), ("weights_sha256", 5), ("domains", "ab"),
        ("rank_pattern", {"q_proj": 1}), ("auto_mapping", 3), ("revision", [1]), ("weights_sha256", "0" * 63),
    ],
)  # fmt: skip
def test_what_was_a_traceback_names_the_field(adapters, tmp_path, name, value):
    folder = tmp_path / "out"
    shutil.copytree(adapters["context"], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"`{name}"):
        load(folder)
