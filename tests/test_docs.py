# SPDX-License-Identifier: Apache-2.0
"""Documentation that names code names code that exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.methods import FIELD, METHODS, OWN
from alter_peft.evaluation import ATTACKS, METRICS, TASKS
from alter_peft.losses import FORGET_LOSSES, RETAIN_LOSSES


ROOT = Path(__file__).parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text()
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


OF_REGISTRIES = ("evaluation/metrics/", "evaluation/attacks/", "evaluation/tasks/")


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
    found = [path.relative_to(ROOT / "alter_peft").as_posix() for path in (ROOT / "alter_peft").rglob("*.py")]
    files = {path for path in found if not path.endswith("__init__.py")}
    entries = {path for path in files if path.startswith(OF_REGISTRIES)}  # a new one needs no line there
    assert len(named) == len(set(named)) and files - entries <= set(named) <= files


def test_what_ci_calls_has_a_recipe():
    """`make X` of a `.PHONY` target without a recipe succeeds and does nothing."""
    targets = re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert {"check", "test", "test-slow", "test-oldest", "test-package"} <= set(targets)
    with_recipe = re.findall(r"^([a-z-]+):.*\n\t", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(targets) - set(with_recipe) == set()


def test_what_readme_links_to_is_there():
    """Links are absolute, as a package index shows README too, and lead to files and headings of the checkout."""
    found = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    own = "https://github.com/alter-peft/alter-peft/"
    assert all(link.startswith("https://") for link in found)
    for link in (link for link in found if link.startswith(own)):
        path, _, anchor = re.sub(r"^(blob|raw|tree)/main/", "", link.removeprefix(own)).partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in names, link


def rows_below(page, header):
    """The rows of the table of a page of the docs that has this header."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    below = lines[lines.index(header) + 2 :]
    return below[: next((number for number, line in enumerate(below) if not line.startswith("|")), len(below))]


def test_the_methods_are_described_as_their_entries_are():
    assert rows_below("benchmarks.md", "| method | what it is |") == [
        f"| `{name}` | {method.caption} |" for name, method in OWN.items()
    ]

    def retained(weight=1.0, loss="cross_entropy"):
        return "none" if weight == 0 else f"`{loss}`{f' x {weight:g}' * (weight != 1)}"

    expected = []
    for name, one in FIELD.items():
        own = {key.removeprefix("retain_"): value for key, value in one.options.items() if key.startswith("retain_")}
        expected.append(f"| `{name}` | {one.caption} | `{one.options['forget_loss']}` | {retained(**own)} |")
        kinds = {"lora", "full", *(["alter"] if one.of_tokens else [])}
        assert {kind for kind in ("lora", "alter", "full") if f"{kind}_{name}" in METHODS} == kinds
    assert rows_below("benchmarks.md", "| name | what it is | forget loss | retain loss |") == expected
    (help_text,) = (one.metadata["help"] for one in fields(BenchmarkArguments) if one.name == "methods")
    described = {name: one.caption for name, one in {**OWN, **FIELD}.items()}
    assert all(f"{name}: {caption}" in help_text for name, caption in described.items()) and "%" not in help_text


def test_every_need_of_a_loss_is_described():
    needs = {need for loss in FORGET_LOSSES.values() for need in loss.needs}
    described = [re.match(r"\| `(\w+)` \|", row) for row in rows_below("paper.md", "| need | what it is |")]
    assert {found[1] for found in described if found} == needs


def test_the_losses_are_described_as_their_entries_are():
    def quoted(words):
        return ", ".join(f"`{word}`" for word in words)

    expected = [
        f"| `{name}` | {loss.caption} | {'low-entropy ' * loss.low_entropy}{loss.over} | {quoted(sorted(loss.needs))} "
        f"| {quoted(f'{option}={value}' for option, value in loss.options.items())} | {loss.source} |"
        for name, loss in FORGET_LOSSES.items()
    ]
    header = "| forget loss | what it does | mean over | needs | options | source |"
    assert [re.sub(" +", " ", row) for row in expected] == rows_below("paper.md", header)
    weights = {name: loss.weight for name, loss in FORGET_LOSSES.items() if loss.weight != 1}
    assert all(f"`{name}` is multiplied by {weight} " in PAPER for name, weight in weights.items())
    expected = [
        f"| `{name}` | {loss.caption} | {'the base model' * loss.needs_base} | {loss.source} |"
        for name, loss in RETAIN_LOSSES.items()
    ]
    header = "| retain loss | what it does | needs | source |"
    assert [re.sub(" +", " ", row) for row in expected] == rows_below("paper.md", header)


def test_every_metric_attack_and_task_is_in_the_docs():
    """Metrics by the first cell of a row, attacks by the last one."""
    benchmarks, threats = ((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "threat_model.md"))
    assert [name for name in METRICS if not re.search(rf"^\| [^|]*`{name}`", benchmarks, re.MULTILINE)] == []
    of_tasks = {metric for task in TASKS.values() for metric in task.metrics}
    assert [name for name in of_tasks if not re.search(rf"`(\w+/)?{name}`", benchmarks)] == []
    assert [name for name in ATTACKS if not re.search(rf"\| `[^|]*\b{name}`[^|]*\|$", threats, re.MULTILINE)] == []
    assert [name for name in TASKS if name not in benchmarks.lower() and name != "choices"] == []
