# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: who may import whom, and how large they may grow (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT): path for path in sorted((ROOT / "alter_peft").rglob("*.py"))}
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
MOST_LINES, LARGEST_SHARE = 400, 0.35
# a room -> the rooms that it may import from, beside the files that stand alone at the top of the package
BELOW: dict[str, set[str]] = {
    "demo": set(),
    "reading": set(),
    "losses": set(),
    "tuner": set(),
    "trainer": {"reading", "losses", "tuner"},
    "evaluation": {"reading", "losses", "tuner"},
    "benchmark": {"losses", "tuner", "trainer", "evaluation"},
    "report": {"losses", "tuner", "evaluation"},
    "commands": {"reading", "demo", "losses", "tuner", "trainer", "evaluation", "benchmark", "report"},
}


def imports_of(name: str, source: str) -> set[str]:
    """The modules of the package that a module imports anywhere, also for type checking alone."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in found if module in MODULES} - {name}


def outside_of(source: str) -> set[str]:
    """The packages that a module imports anywhere, beside this one and Python's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return {name.partition(".")[0] for name in found} - {"alter_peft", *sys.stdlib_module_names}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imports_of(name, FILES[path].read_text()) for name, path in MODULES.items()}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else ""


def test_imports_are_found():
    """Whatever their form; else the tests below could not fail."""
    source = "\n".join(
        [
            "import alter_peft.entropy", "from . import lock", "from .scores import Key", "if TYPE_CHECKING:",
            "    from alter_peft.trainer.config import UnlearnConfig", "def late():",
            "    from ..benchmark.grid import Grid",
        ]
    )  # fmt: skip
    expected = {"entropy", "evaluation", "evaluation.scores", "trainer.config", "benchmark.grid"}
    assert imports_of("alter_peft.evaluation.answers", source) == {f"alter_peft.{name}" for name in expected}
    assert sum(map(len, graph().values())) > 200
    outside = "import os, torch.nn as nn\ndef late():\n    from transformers.cache_utils import Cache\n"
    assert outside_of(source + "\n" + outside) == {"torch", "transformers"}


def test_no_two_files_import_one_another():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"These import one another in a circle: {' -> '.join(error.args[1])}")


def test_rooms_look_downwards():
    wrong = {
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if room(name) and room(other) not in {"", room(name), *BELOW[room(name)]}
    }
    assert not wrong


def test_the_losses_need_torch_alone():
    """Beside what the package has of entropies, which needs nothing else either."""
    own = {name for name in MODULES if room(name) == "losses"} | {"alter_peft.entropy"}
    assert not set().union(*(graph()[name] for name in own)) - own
    assert set().union(*(outside_of(MODULES[name].read_text()) for name in own)) == {"torch"}


def test_no_file_and_no_room_is_too_large():
    lines = {path: len(file.read_text().splitlines()) for path, file in FILES.items()}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES}
    rooms = Counter[str]()
    for path, count in lines.items():
        rooms[path.parts[1]] += count
    assert not {name: count for name, count in rooms.items() if count >= LARGEST_SHARE * sum(lines.values())}
