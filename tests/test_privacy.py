# SPDX-License-Identifier: Apache-2.0
"""Nothing is sent anywhere: each command runs on local files in a process whose every attempt to connect is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_llama
from tiny_tofu import write_tofu

from alter_peft.privacy import telemetry_is_wanted


# An audit hook sees the sockets of all threads and cannot be taken off; what is tried fails at once.
WATCHED = """
import json, socket, sys

tried = []

def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if event == "socket.connect" and args[0].family == getattr(socket, "AF_UNIX", None):
            return
        tried.append([event, str(args[1:] if event == "socket.connect" else args)])
        raise OSError("this test has no network")

sys.addaudithook(watch)
{code}
from huggingface_hub.utils import _telemetry
_telemetry._TELEMETRY_QUEUE.join()  # sent by a thread of its own
print("TRIED", json.dumps(tried))
"""
COMMANDS = """
from alter_peft.cli import main
for argv in json.loads(sys.argv[1]):
    main(argv)
"""
ROWS = [
    {"prompt": "Where does Alice live?", "completion": " Alice lives in Paris.", "domain": "person"},
    {"prompt": "What does Bob bake?", "completion": " Bob bakes rye bread.", "domain": "recipe"},
]
# which the tests have set, and CI, under which TRL is silent
SILENCING = {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"}


def tried_to_send(code: str, folder: Path, *argv: str, **environment: str) -> list[list[str]]:
    """What a fresh process that runs `code` tried to connect to."""
    root = Path(__file__).parents[1]
    kept = {name: value for name, value in os.environ.items() if name not in SILENCING}
    kept |= {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", WATCHED.replace("{code}", code), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TRIED ")]
    return json.loads(line.removeprefix("TRIED "))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A tiny model and rows in a folder, named as they are from within it."""
    folder = tmp_path_factory.mktemp("private")
    make_llama(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, rows in (("forget", ROWS), ("retain", [{**row, "prompt": f"Now: {row['prompt']}"} for row in ROWS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "unseen.csv").write_text("prompt,completion\nWhere does Carl live?, In Oslo.\n")
    question = {"question": "What is the sky?", "choices": ["blue", "green"], "answer": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    write_tofu(folder / "tofu")
    return folder


def test_every_command_on_local_files_sends_nothing(place):
    quick = "--max_steps 2 --entropy_quantile 0.7 --save_strategy steps --save_steps 1 --bf16 false"
    rows = "--forget forget.jsonl --retain retain.jsonl --calibration unseen.csv"
    commands = [
        f"unlearn --model base --force {rows} --output_dir out {quick}",
        f"unlearn --adapter lora --model base --force {rows} --output_dir plain --max_steps 1 --bf16 false",
        "generate --adapter out --prompt Who? --max_new_tokens 2",
        "generate --adapter out --model base --prompt Who? --max_new_tokens 2",
        "evaluate --model base --adapter out --sets a=forget.jsonl --max_new_tokens 2 --output_file scores.json",
        "evaluate --model base --tasks questions.jsonl --output_file choices.json",
        "evaluate --model base --tofu tofu --answered 1 --rows 1 --max_new_tokens 2 --output_file tofu.json",
    ]
    assert tried_to_send(COMMANDS, place, json.dumps([line.split() for line in commands])) == []


TRAINERS = """
from datasets import Dataset
from alter_peft.benchmark.teaching import LabelledTrainer
from alter_peft import UnlearnConfig, UnlearnTrainer
from trl import SFTConfig
rows = [[{"prompt": f"{a} {b}?", "completion": f" {b}"} for b in "xy"] for a in "ab"]
forget, retain = map(Dataset.from_list, rows)
options = {"output_dir": "trained", "max_steps": 1, "report_to": "none"}
UnlearnTrainer("base", UnlearnConfig(**options), train_dataset=forget, retain_dataset=retain)
LabelledTrainer("base", SFTConfig(**options, bf16=False), train_dataset=forget)
"""


@pytest.mark.slow
def test_a_trainer_sends_nothing_unless_the_user_turns_telemetry_on(place):
    assert tried_to_send(TRAINERS, place) == []
    wanted = tried_to_send(TRAINERS, place, HF_HUB_DISABLE_TELEMETRY="0")
    assert wanted and all("huggingface.co" in host for _, host in wanted)  # so the test sees what is sent


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("", False), ("1", False), ("0", True), ("False", True)])
def test_only_a_word_for_no_turns_it_on(monkeypatch, value, wanted):
    for name in SILENCING:
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("DO_NOT_TRACK", value)
    assert telemetry_is_wanted() is wanted
