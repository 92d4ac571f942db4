# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from trl.scripts.utils import TrlParser

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.commands.report import report
from alter_peft.evaluation.arguments import EvaluateArguments


ROOT = Path(__file__).parents[1]
PAGES = ("docs/benchmarks.md", "docs/report.md", "docs/threat_model.md", "examples/pilot.yaml", "examples/hazard.yaml")
ARGUMENTS = {"evaluate": EvaluateArguments, "benchmark": BenchmarkArguments}


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, subcommand and arguments of every command in a block of code, or in a comment that is one."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"^(?:# )?    (alter-peft .*)$", text, flags=re.MULTILINE)
        for block in blocks:
            words = shlex.split(block.replace("\\\n", " "), comments=True)
            starts = [i for i, word in enumerate(words) if word == "alter-peft"]
            for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
                found.append((page, words[start + 1], words[start + 2 : end]))
    return found


def test_there_are_commands():
    assert {(page, name) for page, name, _ in commands()} >= {
        ("docs/benchmarks.md", "evaluate"), ("docs/benchmarks.md", "benchmark"), ("docs/report.md", "report"),
        ("examples/pilot.yaml", "benchmark"),
    }  # fmt: skip


@pytest.mark.parametrize(("page", "name", "argv"), commands())
def test_a_command_is_understood(page, name, argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    if name == "report":
        with pytest.raises(ValueError, match="there is no such folder"):
            report(argv)
    else:
        TrlParser((ARGUMENTS[name],)).parse_args_and_config(argv)


def test_the_pilot_and_its_local_copies(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--config", "examples/pilot.yaml"]
    (args,) = TrlParser((BenchmarkArguments,)).parse_args_and_config(argv)
    assert (args.data, args.tasks, args.oracle_seeds) == ("locuslab/TOFU", ["arc_easy"], [0, 1, 2])
    flags = re.findall(r"^\t.*benchmark --config examples/pilot.yaml (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert flags == ["$(TOFU:%=--data %) $(ARC:%=--tasks %)"]
    (local,) = TrlParser((BenchmarkArguments,)).parse_args_and_config([*argv, "--data", "x", "--tasks", "y.jsonl"])
    assert (local.data, local.tasks) == ("x", ["y.jsonl"]) and local.options == args.options


def test_the_hazard_and_its_local_copies(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--config", "examples/hazard.yaml"]
    (args,) = TrlParser((BenchmarkArguments,)).parse_args_and_config(argv)
    assert args.task == ("hazard", {}) and (args.tasks, args.form) == (["arc_easy"], "texts")
    flags = re.findall(r"^\t.*benchmark --config examples/hazard.yaml (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert flags == ["$(if $(MCQ),--tasks $(MCQ))"]
    (local,) = TrlParser((BenchmarkArguments,)).parse_args_and_config([*argv, "--tasks", "x.jsonl", "y.jsonl"])
    assert local.tasks == ["x.jsonl", "y.jsonl"] and local.options == args.options
