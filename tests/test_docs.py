# SPDX-License-Identifier: Apache-2.0
"""Documentation that names code names code that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alter_peft.evaluation import ATTACKS, METRICS, TASKS


ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "docs" / "peft_features.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED.findall(FEATURES.read_text()))))
def test_tests_that_the_features_name_exist(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE)


def test_every_row_of_the_features_names_its_test():
    """Rows of the tables whose last column is `test`."""
    rows, inside = [], False
    for line in FEATURES.read_text().splitlines():
        inside = line.startswith("|") and (inside or line.endswith("| test |"))
        if inside and not line.endswith(("| test |", "|---|")):
            rows.append(line)
    assert len(rows) > 60 and [row for row in rows if not NAMED.search(row)] == []


def test_the_tree_shows_every_file():
    """That of CONTRIBUTING.md: folders by their indentation, one file or several a line."""
    tree = re.search(
        r"^alter_peft/\n(.*?)^examples/", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert tree is not None
    folders, named = [], []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folders = folders[:depth]
        named += ["".join([*folders, name]) for name in names if name.endswith(".py")]
        if names[0].endswith("/"):
            folders.append(names[0])
    files = [path.relative_to(ROOT / "alter_peft").as_posix() for path in (ROOT / "alter_peft").rglob("*.py")]
    assert sorted(named) == sorted(path for path in files if not path.endswith("__init__.py"))


def test_what_ci_calls_has_a_recipe():
    """`make X` of a `.PHONY` target without a recipe succeeds and does nothing."""
    targets = re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert {"check", "test", "test-slow", "test-oldest"} <= set(targets)
    with_recipe = re.findall(r"^([a-z-]+):.*\n\t", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(targets) - set(with_recipe) == set()


def test_every_metric_attack_and_task_is_in_the_docs():
    benchmarks, threats = ((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "threat_model.md"))
    of_tasks = {metric for task in TASKS.values() for metric in task.metrics}
    assert [name for name in (METRICS.keys() | of_tasks) if not re.search(rf"`(\w+/)?{name}`", benchmarks)] == []
    assert [name for name in ATTACKS if f"`{name}`" not in threats] == []
    assert [name for name in TASKS if name not in benchmarks.lower() and name != "choices"] == []
