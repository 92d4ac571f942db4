# SPDX-License-Identifier: Apache-2.0
"""What a decoder does with its layers is found out once and kept on disk for other processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_llama

from alter_peft.tuner import probe
from alter_peft.tuner.probe import uses_of_layers
from alter_peft.tuner.uses import kept_at


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("alter_peft.tuner.uses.HF_HOME", str(tmp_path))
    probe._uses.cache_clear()
    yield tmp_path
    probe._uses.cache_clear()


@pytest.fixture
def passes(monkeypatch) -> list[type]:
    """The class of each model that a pass was made over."""
    found, find = [], probe._find
    monkeypatch.setattr(probe, "_find", lambda cls, key: found.append(cls) or find(cls, key))
    return found


def another_process() -> None:
    probe._uses.cache_clear()


def test_another_process_reads_what_was_found(home, passes):
    model = make_llama(384)
    first = uses_of_layers(model)
    another_process()
    again = uses_of_layers(model)
    assert passes == [type(model)]
    assert again == first and first.layers["model.layers.0.mlp.up_proj"].is_by_token
    assert all(isinstance(shape, tuple) for use in again.layers.values() for shape in use.shapes)
    assert again.streams["model.layers.0"] == (5, 7, 32)


def test_another_config_or_class_is_looked_at_anew(home, passes):
    class Other(type(make_llama(384))):
        pass

    uses_of_layers(make_llama(384))
    uses_of_layers(make_llama(384, num_hidden_layers=2))
    uses_of_layers(Other(make_llama(384).config))
    assert len(passes) == 3 and len(list(home.rglob("layers-*.json"))) == 2  # a class of one's own is kept nowhere


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '[{"a": 1}, {}, null]', "[null, null, null]", "[[], {}, null]", "[{}, {}, null]"]
)
def test_a_file_that_cannot_be_read_is_written_anew(home, passes, text):
    model = make_llama(384)
    first = uses_of_layers(model)
    (path,) = home.rglob("layers-*.json")
    path.write_text(text)
    another_process()
    assert uses_of_layers(model) == first and len(passes) == 2
    assert len(json.loads(path.read_text())) == 3


def test_what_is_found_out_in_part_is_not_kept(home, monkeypatch, caplog):
    monkeypatch.setattr(probe, "_next_token", lambda *args: 1 / 0)
    assert uses_of_layers(make_llama(384)).layers
    assert "division by zero" in caplog.text and not list(home.rglob("layers-*"))


def test_a_disk_that_cannot_be_written_costs_a_pass_alone(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr("alter_peft.tuner.uses.HF_HOME", str(file))
    assert uses_of_layers(make_llama(384)).layers and file.read_text() == ""


def test_classes_that_are_not_of_transformers_are_not_kept():
    assert kept_at(type("Unwritten", (), {"__module__": "builtins"}), "{}") is None
