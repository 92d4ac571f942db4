# SPDX-License-Identifier: Apache-2.0
"""Metrics by name on sets of questions: what each reads of a model is computed once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from .answers import AnswerScores, Pair, generate_answers, routes_tokens, score_answers, spread
from .metrics import (
    exact_memorization,
    extraction_strength,
    min_k,
    near_one,
    rouge_l,
    truth_ratio,
    truthfulness,
    unique_tokens,
)


class Score(NamedTuple):
    """
    One metric on one set.

    value: what is reported, the mean of the rows unless the metric says otherwise.
    rows: one number a question, in the order of the set; fewer where only some were answered.
    """

    value: float
    rows: list[float]


class Asked:
    """
    A model, asked one set of questions.

    Args:
        name: of the set, for messages and progress bars.
        is_forget: whether the set is to be forgotten.
        answered: so many questions, spread evenly over the set, are answered in full; all by default.
        max_new_tokens: of an answer.
        batch_size: rows of a pass and of a batch of answers; by default those of `score_answers` and
            `generate_answers`.

    Raises:
        ValueError: `pairs` is empty, or a number is below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        pairs: Sequence[Pair],
        is_forget: bool = False,
        answered: int | None = None,
        max_new_tokens: int = 40,
        batch_size: int | None = None,
    ) -> None:
        for argument, value in (
            ("answered", answered),
            ("max_new_tokens", max_new_tokens),
            ("batch_size", batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` is {value}, but must be 1 or more.")
        if not pairs:
            raise ValueError(f"The set {name!r}: `pairs` is empty. Give at least one question and answer.")
        self.model, self.tokenizer, self.name, self.pairs, self.is_forget = model, tokenizer, name, pairs, is_forget
        self.asked = spread(pairs, answered)
        self.max_new_tokens = max_new_tokens
        self.batches = {} if batch_size is None else {"batch_size": batch_size}

    @cached_property
    def scores(self) -> AnswerScores:
        """The true answers."""
        return self._score(self.pairs, self.name)

    @cached_property
    def true_means(self) -> list[float]:
        """Mean log-probability of the true answer, one a question: in other words if the set has them."""
        rephrased = [pair._replace(completion=pair.rephrased) for pair in self.pairs if pair.rephrased]
        if not rephrased:
            return [float(row.mean()) for row in self.scores.log_probs]
        _require_rephrased(self.name, self.pairs)
        return [float(row.mean()) for row in self._score(rephrased, f"{self.name}, rephrased").log_probs]

    @cached_property
    def false_means(self) -> list[list[float]]:
        """Mean log-probability of each false answer of each question."""
        _require_wrong(self.name, self.pairs)
        false = [pair._replace(completion=answer) for pair in self.pairs for answer in pair.wrong]
        means = iter([float(row.mean()) for row in self._score(false, f"{self.name}, false answers").log_probs])
        return [[next(means) for _ in pair.wrong] for pair in self.pairs]

    @cached_property
    def texts(self) -> list[str]:
        """Greedy answers to `asked`."""
        options: dict[str, Any] = {**self.batches, "max_new_tokens": self.max_new_tokens}
        return generate_answers(self.model, self.tokenizer, self.asked, desc=f"{self.name}, answers", **options)

    def _score(self, pairs: Sequence[Pair], desc: str) -> AnswerScores:
        return score_answers(self.model, self.tokenizer, pairs, desc=desc, **self.batches)


def answer_together(asked: Sequence[Asked], batch_size: int) -> None:
    """
    The answers of several sets from batches that they share, prompts of about the same length together.

    A few answers a set make small batches, in which a token costs about as much as in large ones.

    Args:
        asked: of one model, all with the same `max_new_tokens`.
        batch_size: rows of a batch of answers.

    Raises:
        ValueError: different `max_new_tokens`.
    """
    if not asked:
        return
    lengths = sorted({one.max_new_tokens for one in asked})
    if len(lengths) > 1:
        raise ValueError(f"`max_new_tokens` is {lengths} in sets that are answered together. Give all the same.")
    questions = [((i, row), pair) for i, one in enumerate(asked) for row, pair in enumerate(one.asked)]
    questions.sort(key=lambda question: len(question[1].prompt) + len(question[1].given))
    places, pairs = zip(*questions, strict=True)
    first = asked[0]
    texts = generate_answers(first.model, first.tokenizer, pairs, batch_size, first.max_new_tokens, desc="answers")
    found = dict(zip(places, texts, strict=True))
    for i, one in enumerate(asked):
        one.texts = [found[i, row] for row in range(len(one.asked))]


def _normalized_probability(asked: Asked) -> list[float]:
    """p / (p + sum of the false answers'), from logarithms: a destroyed model's probabilities may all round to 0."""
    true = [float(row.mean()) for row in asked.scores.log_probs]
    return [float(softmax([mean, *false])[0]) for mean, false in zip(true, asked.false_means, strict=True)]


# one number a question, in the order of the set
METRICS: dict[str, Callable[[Asked], list[float]]] = {
    "probability": lambda asked: asked.scores.probability,
    "normalized_probability": _normalized_probability,
    "rouge": lambda asked: rouge_l(asked.texts, [pair.completion for pair in asked.asked]),
    "truth_ratio": lambda asked: truth_ratio(asked.true_means, asked.false_means),
    "exact_memorization": lambda asked: exact_memorization(asked.scores.greedy, asked.scores.content),
    "extraction_strength": lambda asked: extraction_strength(asked.scores.greedy, asked.scores.content),
    "min_k": lambda asked: min_k(asked.scores.log_probs, asked.scores.content),
    "unique_tokens": lambda asked: unique_tokens(asked.texts),
    "astray": lambda asked: asked.scores.astray(asked.is_forget),
}


def check_set(name: str, pairs: Sequence[Pair], metrics: Sequence[str]) -> None:
    """
    Before anything is computed: whether a set has what some metrics need of it.

    Raises:
        ValueError: a metric that does not exist, or whose input the set does not have.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"`metrics` has {unknown}, but must be some of {list(METRICS)}.")
    if "truth_ratio" in metrics or "normalized_probability" in metrics:
        _require_wrong(name, pairs)
    if "truth_ratio" in metrics:
        _require_rephrased(name, pairs)


def _require_wrong(name: str, pairs: Sequence[Pair]) -> None:
    missing = next((row for row, pair in enumerate(pairs) if not pair.wrong), None)
    if missing is not None:
        raise ValueError(
            f"The set {name!r} has no `wrong` answers in row {missing}, which truth_ratio and normalized_probability "
            "compare with the true one. Add them, or leave the metric out."
        )


def _require_rephrased(name: str, pairs: Sequence[Pair]) -> None:
    missing = next((row for row, pair in enumerate(pairs) if not pair.rephrased), None)
    if missing is not None and any(pair.rephrased for pair in pairs):
        raise ValueError(
            f"The set {name!r} has no `rephrased` answer in row {missing}, but others have one. Give it to all or to "
            "none: an answer that was learned by heart can't be compared with rephrased ones."
        )


def check_routing(model: Any, name: str, metrics: Sequence[str]) -> None:
    """Raise a `ValueError` if a metric is of routed tokens and the model has no adapter that routes them."""
    if "astray" in metrics and not routes_tokens(model):
        raise ValueError(
            f"'astray' was asked of the set {name!r}, but the model has no adapter that routes tokens. Leave it out "
            "for this model."
        )


def measure(asked: Asked, metrics: Sequence[str]) -> dict[str, Score]:
    """
    Some metrics on one set: `"{set}/{metric}"` -> score.

    Raises:
        ValueError: a metric that does not exist, or whose input the set or the model does not have; nothing was
            computed then.
    """
    check_set(asked.name, asked.pairs, metrics)
    check_routing(asked.model, asked.name, metrics)
    scores = {}
    for name in metrics:
        rows = METRICS[name](asked)
        value = sum(rows) / len(rows)
        if name == "truth_ratio":
            value = near_one(rows) if asked.is_forget else truthfulness(rows)
        scores[f"{asked.name}/{name}"] = Score(value, rows)
    return scores
