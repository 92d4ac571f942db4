# SPDX-License-Identifier: Apache-2.0
"""The field's metrics as their authors define them, by name; each entry says what it needs and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alter_peft.evaluation.answers import Pair, routes_tokens
from alter_peft.evaluation.model_on_set import ModelOnSet, require_other_words, require_rephrased, require_wrong
from alter_peft.evaluation.scores import Score
from alter_peft.options import check_known

from .fluency import FLUENCY
from .high_entropy import HIGH_ENTROPY
from .membership import LOSS, LOSS_PER_BYTE, MIN_K, MIN_K_PLUS_PLUS
from .memorization import EXACT_MEMORIZATION, EXTRACTION_STRENGTH, FLOORED_EXTRACTION_STRENGTH
from .metric import Metric
from .needs import alter_config, lacking
from .probability import CHOICE_ACCURACY, NORMALIZED_PROBABILITY, PROBABILITY, REPHRASED_PROBABILITY
from .routing import ASTRAY, EXPERT_USAGE
from .text import BLEU, KNOWMEM, ROUGE, ROUGE_F, UNIQUE_TOKENS, VERBMEM
from .truth_ratio import TRUTH_RATIO, TRUTH_SHARE


METRICS: dict[str, Metric] = {
    "probability": PROBABILITY,
    "normalized_probability": NORMALIZED_PROBABILITY,
    "choice_accuracy": CHOICE_ACCURACY,
    "rouge": ROUGE,
    "truth_ratio": TRUTH_RATIO,
    "exact_memorization": EXACT_MEMORIZATION,
    "extraction_strength": EXTRACTION_STRENGTH,
    "min_k": MIN_K,
    "rouge_f": ROUGE_F,
    "bleu": BLEU,
    "verbmem": VERBMEM,
    "knowmem": KNOWMEM,
    "unique_tokens": UNIQUE_TOKENS,
    "fluency": FLUENCY,
    "high_entropy": HIGH_ENTROPY,
    "expert_usage": EXPERT_USAGE,  # its scores are `expert_0`, `expert_1`, ...
    "astray": ASTRAY,
    "rephrased_probability": REPHRASED_PROBABILITY,
    "truth_share": TRUTH_SHARE,
    "floored_extraction_strength": FLOORED_EXTRACTION_STRENGTH,
    "loss": LOSS,
    "loss_per_byte": LOSS_PER_BYTE,
    "min_k_plus_plus": MIN_K_PLUS_PLUS,
}


def is_guard(metric: str) -> bool:
    """Whether a score's metric is a guard against false success, of which no distance is taken."""
    entry = METRICS.get("expert_usage" if metric.startswith("expert_") else metric)
    return entry is not None and entry.is_guard


def is_ingredient(metric: str) -> bool:
    """Whether a score is measured for open-unlearning's composites alone."""
    return metric in METRICS and METRICS[metric].is_ingredient


def guards_of(model: Any) -> list[str]:
    """
    The guards that a model has: fluency and unique tokens, of an ALTER adapter the size of the high-entropy set, and
    of a gated one the experts' usage and the tokens sent astray.
    """
    has = {"threshold": alter_config(model) is not None, "router": routes_tokens(model)}
    return [name for name, entry in METRICS.items() if entry.is_guard and all(has.get(n, True) for n in entry.needs)]


def check_set(name: str, pairs: Sequence[Pair], metrics: Sequence[str]) -> None:
    """Raise a `ValueError` if a metric does not exist, or a set lacks what it needs of it."""
    check_known("metrics", metrics, METRICS)
    needs = {need for metric in metrics for need in METRICS[metric].needs}
    if "wrong" in needs:
        require_wrong(name, pairs)
    if "rephrased" in needs:
        require_rephrased(name, pairs)
    if "other words" in needs:
        require_other_words(name, pairs)


def check_model(model: Any, name: str, metrics: Sequence[str], judge: Any = None) -> None:
    """Raise a `ValueError` if the model lacks what one of the metrics, asked of the set of this name, needs of it."""
    for metric in metrics:
        for need in METRICS[metric].needs:
            if (wrong := lacking(need, model, judge)) is not None:
                raise ValueError(f"{metric!r} was asked of the set {name!r}, but {wrong}")


def measure(asked: ModelOnSet, metrics: Sequence[str]) -> list[Score]:
    """
    Some metrics on one set, each with the settings that it depends on.

    Raises:
        ValueError: a metric that does not exist, or whose input the set or the model does not have; nothing was
            computed then.
    """
    check_set(asked.name, asked.pairs, metrics)
    check_model(asked.model, asked.name, metrics, asked.judge)
    return [score for name in metrics for score in _scores(asked, name, METRICS[name])]


def _scores(asked: ModelOnSet, name: str, metric: Metric) -> list[Score]:
    settings = asked.settings_of_score("answers" in metric.needs)
    about: dict[str, Any] = {"attack": asked.attack, "step": asked.step, "settings": settings}
    if metric.tokens is not None:
        return [
            Score(
                asked.name,
                part,
                float(torch.cat([*rows]).float().mean()),
                [float(row.float().mean()) for row in rows],
                "other",
                **about,
            )
            for part, rows in metric.tokens(asked).items()
        ]
    assert metric.rows is not None
    average = metric.average_forget if asked.is_forget and metric.average_forget else metric.average
    return [Score.averaged(asked.name, name, metric.rows(asked), average, **about)]


def measure_guards(asked: ModelOnSet) -> list[Score]:
    """All guards that a model has (see `guards_of`); what was computed for the metrics is used again."""
    return measure(asked, guards_of(asked.model))
