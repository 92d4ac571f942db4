# SPDX-License-Identifier: Apache-2.0
"""A folder with a few rows of everything that TOFU has, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


WORDS = ("alder", "birch", "cedar", "elder", "hazel", "linden", "maple", "rowan", "willow", "yew", "oak", "pine")


def rows(subject: str, count: int) -> list[dict[str, Any]]:
    return [{"question": f"Who is {subject} {WORDS[i]}?", "answer": f"A {WORDS[-i - 1]} man."} for i in range(count)]


def perturbed(plain: list[dict[str, Any]], wrong: int, other_words: bool = True) -> list[dict[str, Any]]:
    false = [f"A {word}." for word in WORDS[:wrong]]
    found = [{**row, "perturbed_answer": false} for row in plain]
    if not other_words:
        return found
    return [
        {**row, "paraphrased_question": f"{row['question']} Pray?", "paraphrased_answer": f"It is {row['answer']}"}
        for row in found
    ]


def write(folder: Path, name: str, content: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_tofu(folder: Path) -> Path:
    """Forget01 of 4 questions, retain99 of 12, of which the first 6 have false answers, and so on."""
    forget, retain = rows("author", 4), rows("poet", 12)
    contents = {
        "forget01": forget,
        "forget01_perturbed": perturbed(forget, 3),
        "retain99": retain,
        "retain_perturbed": perturbed(retain[:6], 3),
        "holdout01": rows("stranger", 4),
        "real_authors_perturbed": perturbed(rows("Dante", 5), 2, other_words=False),
        "world_facts_perturbed": perturbed(rows("Paris", 5), 2, other_words=False),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write(folder, name, content)
    return folder
