# SPDX-License-Identifier: Apache-2.0
"""How likely the true answer is."""

from __future__ import annotations

from math import exp

from scipy.special import softmax

from alter_peft.evaluation.model_on_set import ModelOnSet

from .metric import Metric


def normalized_probability(asked: ModelOnSet) -> list[float]:
    """p / (p + sum of the false answers'), from logarithms: a destroyed model's probabilities may all round to 0."""
    means = zip(asked.scores.means, asked.false_means, strict=True)
    return [float(softmax([true, *false])[0]) for true, false in means]


def choice_accuracy(asked: ModelOnSet) -> list[float]:
    """
    1 where the true answer, in other words if the set has them, is likelier than each false one, and else 0.

    By the mean log-probability of a token, as lm-evaluation-harness's `acc_norm` by that of a byte. Deeb and Roger
    (arXiv 2410.08827) measure what was forgotten, and what comes back, by multiple choice.
    """
    means = zip(asked.true_means, asked.false_means, strict=True)
    return [float(true > max(false)) for true, false in means]


PROBABILITY = Metric(
    caption="exp of the mean log-probability of the true answer's tokens", rows=lambda asked: asked.scores.probability
)
CHOICE_ACCURACY = Metric(
    caption="share of the questions whose true answer is likelier than each false one",
    rows=choice_accuracy,
    needs=("wrong", "rephrased"),
)
NORMALIZED_PROBABILITY = Metric(
    caption="the same over its sum with those of the false answers", rows=normalized_probability, needs=("wrong",)
)
REPHRASED_PROBABILITY = Metric(
    caption="exp of the mean log-probability of the true answer in other words",
    rows=lambda asked: [exp(mean) for mean in asked.true_means],
    needs=("other words",),
    is_ingredient=True,
)
