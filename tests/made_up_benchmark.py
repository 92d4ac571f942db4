# SPDX-License-Identifier: Apache-2.0
"""A small benchmark of made-up results: target, three oracles, two seeds of one method, and cells that failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alter_peft.evaluation import Key, Result, Score, Scores


RATIOS = [0.5, 0.7, 0.9, 1.1]
MIN_K = [1.0, 2.0, 3.0, 4.0]


def save(
    folder: Path, name: str, seed: int, scores: Iterable[Score] = (), curves: Iterable[Score] = (), **changes: Any
) -> Result:
    """
    One cell.

    Args:
        curves: more scores; those of before are there no more.
        changes: of the result; `without` names the scores that it lacks.
    """
    without = changes.pop("without", ())
    result = Result(name, seed, machine="2 CPU threads", **changes)
    result.scores = Scores(score for score in (*scores, *curves) if str(score.key) not in without)
    result.save(folder / f"{name}-{seed}" / "result.json")
    return result


def named(**values: float | Sequence[float]) -> list[Score]:
    """`set__metric` or `attack__set__metric` -> a value, or the rows that it is the mean of."""
    found = []
    for name, value in values.items():
        *attack, of, metric = name.split("__")
        about = {"attack": attack[0] if attack else None}
        if isinstance(value, (int, float)):
            found.append(Score(of, metric, value, **about))
        else:
            found.append(Score.averaged(of, metric, value, **about))
    return found


def scores(probability: float, utility: float, shift: float = 0.0, **others: float) -> list[Score]:
    """
    Scores of a model.

    Args:
        shift: of its truth ratios and of Min-K% on the forget set.
        others: as `named` takes them.
    """
    ratios, min_k = [ratio + shift for ratio in RATIOS], [value + 10 * shift for value in MIN_K]
    return [
        Score("forget", "probability", probability, [probability] * 4),
        Score.averaged("forget", "truth_ratio", ratios),
        Score.averaged("forget", "min_k", min_k),
        Score("holdout", "min_k", 2.5, MIN_K),
        Score("utility", "model_utility", utility, average="other"),
        *named(**others),
    ]


def relearning(*values: float) -> list[Score]:
    return curve("held-out half", dict(zip((0, 1, 50), values, strict=True)), "relearning")


def curve(name: str, values: dict[int, float], attack: str | None = None) -> list[Score]:
    """Probabilities by step, or after so many requests."""
    return [Score(name, "probability", value, attack=attack, step=step) for step, value in values.items()]


def key(text: str) -> Key:
    """Of `set/metric` or `attack/set/metric`."""
    *attack, of, metric = text.split("/")
    return Key(of, metric, attack[0] if attack else None)


def make_benchmark(folder: Path) -> Path:
    """Target, three oracles, alter twice, and lora of which one seed failed."""
    save(folder, "target", 0, scores=scores(0.95, 0.55, -0.3), seconds={"training": 30}, curves=relearning(0.9, 1, 1))
    for seed, step in enumerate((-0.01, 0.0, 0.01)):
        found = scores(0.1 + step, 0.5 + step, step, asking_otherwise__misspelt__probability=0.05)
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
