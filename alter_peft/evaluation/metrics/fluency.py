# SPDX-License-Identifier: Apache-2.0
"""Whether a model that says something else still says something."""

from __future__ import annotations

from contextlib import nullcontext
from math import inf

from alter_peft.evaluation.answers import score_answers
from alter_peft.evaluation.copies import without_adapters
from alter_peft.evaluation.model_on_set import ModelOnSet

from .metric import Metric


def fluency(asked: ModelOnSet) -> list[float]:
    """
    Mean log-probability of a token of each of the model's own answers under a judge, in nats.

    Gibberish is far below what an oracle says. An answer that repeats one phrase is not, since repetition is easy to
    predict: read it beside `unique_tokens`. The end of the turn is not judged, which a limit on the length cuts off,
    but where there is nothing else: an empty answer.

    The judge is a causal language model of the same tokenizer; by default the model itself without its adapters, which
    compares what adapters on one base say. For models of different bases it must be the same model.
    """
    answers = [pair._replace(completion=text) for pair, text in zip(asked.answered_pairs, asked.texts, strict=True)]
    model = asked.model if asked.judge is None else asked.judge
    with without_adapters(model) if asked.judge is None else nullcontext():
        scores = score_answers(model, asked.tokenizer, answers, desc=f"{asked.name}, fluency", **asked.batches)
    return [float(row[: n or None].mean()) for row, n in zip(scores.log_probs, scores.content, strict=True)]


FLUENCY = Metric(
    caption="mean log-probability of a token of the model's own answers under a judge",
    range=(-inf, 0.0),
    unit="nats",
    rows=fluency,
    needs=("answers", "judge"),
    is_guard=True,
)
