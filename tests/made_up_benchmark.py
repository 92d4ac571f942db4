# SPDX-License-Identifier: Apache-2.0
"""A small benchmark of made-up results: target, three oracles, two seeds of one method, and cells that failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alter_peft.evaluation import Result, Score


RATIOS = [0.5, 0.7, 0.9, 1.1]
MIN_K = [1.0, 2.0, 3.0, 4.0]


def save(folder: Path, name: str, seed: int, **changes: Any) -> Result:
    """One cell, whole but for what is changed; `without` names the scores that it lacks."""
    without = changes.pop("without", ())
    result = Result(name, seed, machine="2 CPU threads", **changes)
    result.scores = {key: score for key, score in result.scores.items() if key not in without}
    result.save(folder / f"{name}-{seed}" / "result.json")
    return result


def scores(probability: float, utility: float, shift: float = 0.0, **others: float) -> dict[str, Score]:
    """
    Scores of a model.

    shift: of its truth ratios and of Min-K% on the forget set.
    others: `set__metric` -> value.
    """
    ratios, min_k = [ratio + shift for ratio in RATIOS], [value + 10 * shift for value in MIN_K]
    found = {
        "forget/probability": Score(probability, [probability] * 4),
        "forget/truth_ratio": Score(sum(ratios) / 4, ratios),
        "forget/min_k": Score(sum(min_k) / 4, min_k),
        "holdout/min_k": Score(2.5, MIN_K),
        "utility/model_utility": Score(utility, []),
    }
    return found | {key.replace("__", "/"): Score(value, []) for key, value in others.items()}


def relearning(*values: float) -> dict[str, list[tuple[float, float]]]:
    return {"relearn_half/held_out/probability": list(zip((0.0, 1.0, 50.0), values, strict=True))}


def make_benchmark(folder: Path) -> Path:
    """Target, three oracles, alter twice, and lora of which one seed failed."""
    save(folder, "target", 0, scores=scores(0.95, 0.55, -0.3), seconds={"training": 30}, curves=relearning(0.9, 1, 1))
    for seed, step in enumerate((-0.01, 0.0, 0.01)):
        found = scores(0.1 + step, 0.5 + step, step, asked__misspelt__probability=0.05)
        save(
            folder, "oracle", seed, scores=found, seconds={"training": 20},
            curves=relearning(0.1, 0.2, 0.6 + step),
        )  # fmt: skip
    for seed in (0, 1):
        routed = {"forget__expert_0": 0.1, "forget__expert_1": 0.9, "forget__astray": 0.1}
        save(
            folder, "alter", seed, scores=scores(0.11 + 0.02 * seed, 0.49, 0.0, **routed),
            seconds={"training": 10 + 2 * seed, "evaluation": 5}, curves=relearning(0.1, 0.2, 0.5),
            settings={"learning_rate": 0.001},
        )  # fmt: skip
    save(folder, "lora", 0, error="RuntimeError: out of\nmemory | CUDA")
    save(folder, "lora", 1, scores=scores(0.0, 0.2, 0.4), seconds={"training": 8}, curves=relearning(0, 0.4, 0.9))
    return folder
