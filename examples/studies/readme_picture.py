# SPDX-License-Identifier: Apache-2.0
"""README's picture: answers of `alter-peft demo`, and what two methods leave of the retained text over ten requests.

    alter-peft demo && python examples/studies/readme_picture.py

The second half is drawn from the tables of docs/earlier_results.md. Writes docs/first_look.png.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt


ROOT = Path(__file__).parents[2]
ANSWERS = Path("alter-peft-demo/answers.json")
ASKED = {"France": "asked to forget", "Germany": "asked to keep", "Kenya": "not mentioned"}
METHODS = {"### ALTER": "ALTER, an adapter each", "### LoRA with NPO": "LoRA with NPO, untuned"}
BLUE, GREY, RED = "#0b5fa5", "#666666", "#b5402b"


def retained(heading: str) -> list[float]:
    """The row `retain` of the table under a heading of docs/earlier_results.md, after 0 to 10 requests."""
    lines = (ROOT / "docs" / "earlier_results.md").read_text().splitlines()
    start = lines.index("## Ten requests, one after another")
    start = lines.index(heading, start)
    row = next(line for line in lines[start:] if line.startswith("| retain |"))
    return [float(cell) for cell in row.strip("| ").split("|")[1:]]


def draw_chat(axes: plt.Axes, answers: dict) -> None:
    axes.axis("off")
    axes.set_title("One question each, before and after (alter-peft demo)", loc="left", fontsize=10)
    height = 0.92
    for country, what in ASKED.items():
        axes.text(0, height, f"What is the capital of {country}?", weight="bold", fontsize=9.5, va="baseline")
        axes.text(1, height, what, ha="right", fontsize=8.5, color=GREY, va="baseline", style="italic")
        for label, color in (("before", GREY), ("after", BLUE)):
            height -= 0.1
            said = textwrap.shorten(answers[label][country][0], 62, placeholder=" ...")
            axes.text(0.03, height, label, fontsize=9, color=color, va="baseline")
            axes.text(0.17, height, said, fontsize=9, color=color, va="baseline")
        height -= 0.15


def draw_requests(axes: plt.Axes) -> None:
    for (heading, label), color, at in zip(METHODS.items(), (BLUE, RED), (0.88, 0.2), strict=True):
        values = retained(heading)
        axes.plot(range(len(values)), values, color=color, marker="o", markersize=3.5)
        axes.text(10, at, label, color=color, ha="right", fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(0, 11, 2))
    axes.set_xlabel("deletion requests made", fontsize=9)
    axes.set_title("Probability of retained answers (TOFU)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=(1.45, 1), layout="constrained")
    draw_chat(left, json.loads(ANSWERS.read_text()))
    draw_requests(right)
    figure.savefig(ROOT / "docs" / "first_look.png", dpi=130)


if __name__ == "__main__":
    main()
