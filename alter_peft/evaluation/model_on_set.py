# SPDX-License-Identifier: Apache-2.0
"""A model on a set of questions: what the metrics read of it is computed once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alter_peft.options import check_counts

from .answers import AnswerScores, Pair, generate_answers, score_answers, spread
from .z_scores import token_z_scores


@dataclass(eq=False)
class ModelOnSet:
    """
    A model, asked one set of questions.

    Attributes:
        name: of the set.
        is_forget: whether the set is to be forgotten.
        answered: so many questions, spread evenly over the set, are answered in full; all by default.
        max_new_tokens: of an answer.
        batch_size: rows of a pass and of a batch of answers; by default those of `score_answers` and
            `generate_answers`.
        judge: the model that judges fluency; by default the model itself without its adapters.
        attack, step: under which it is asked (see [`Key`]).
        settings: of the questions, such as the file that they are from, for the scores.

    Raises:
        ValueError: `pairs` is empty, or a number is below 1.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    pairs: Sequence[Pair]
    is_forget: bool = False
    answered: int | None = None
    max_new_tokens: int = 40
    batch_size: int | None = None
    judge: Any = None
    attack: str | None = None
    step: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(answered=self.answered, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        if not self.pairs:
            raise ValueError(f"The set {self.name!r}: `pairs` is empty. Give at least one question and answer.")

    @property
    def answered_pairs(self) -> list[Pair]:
        """The questions that are answered in full."""
        return spread(self.pairs, self.answered)

    @property
    def batches(self) -> dict[str, Any]:
        """The size of a batch, where it is not left to what computes."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    def settings_of_score(self, of_answers: bool) -> dict[str, Any]:
        """
        What a score that is measured now depends on beside the model.

        Args:
            of_answers: whether it is of the model's own answers.
        """
        device = next(self.model.parameters()).device.type
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        asked = {"as_chat": self.tokenizer.chat_template is not None, "bf16": in_bf16, "is_forget": self.is_forget}
        own = {"answered": len(self.answered_pairs), "max_new_tokens": self.max_new_tokens} if of_answers else {}
        return {**asked, **own, **self.settings}

    @cached_property
    def scores(self) -> AnswerScores:
        """The true answers."""
        return self._score(self.pairs, self._label)

    @cached_property
    def true_means(self) -> list[float]:
        """Mean log-probability of the true answer, one a question: in other words if the set has them."""
        require_rephrased(self.name, self.pairs)
        rephrased = [pair._replace(completion=pair.rephrased) for pair in self.pairs if pair.rephrased]
        return (self._score(rephrased, f"{self._label}, rephrased") if rephrased else self.scores).means

    @cached_property
    def z_scores(self) -> list[Tensor]:
        """How far each token of the true answers is from what the model expects there (see `token_z_scores`)."""
        return token_z_scores(self.model, self.tokenizer, self.pairs, desc=f"{self._label}, z-scores", **self.batches)

    @cached_property
    def false_means(self) -> list[list[float]]:
        """Mean log-probability of each false answer of each question."""
        require_wrong(self.name, self.pairs)
        false = [pair._replace(completion=answer) for pair in self.pairs for answer in pair.wrong]
        means = iter(self._score(false, f"{self._label}, false answers").means)
        return [[next(means) for _ in pair.wrong] for pair in self.pairs]

    @cached_property
    def texts(self) -> list[str]:
        """Greedy answers to `answered_pairs`."""
        options = {**self.batches, "max_new_tokens": self.max_new_tokens, "desc": f"{self._label}, answers"}
        return generate_answers(self.model, self.tokenizer, self.answered_pairs, **options)

    @property
    def true_texts(self) -> list[str]:
        """The true answers to `answered_pairs`."""
        return [pair.completion for pair in self.answered_pairs]

    @property
    def _label(self) -> str:
        """For messages and progress bars."""
        return self.name if self.attack is None else f"{self.attack}, {self.name}"

    def _score(self, pairs: Sequence[Pair], desc: str) -> AnswerScores:
        return score_answers(self.model, self.tokenizer, pairs, desc=desc, **self.batches)


def answer_together(asked: Sequence[ModelOnSet], batch_size: int) -> None:
    """
    The answers of several sets from batches that they share, prompts of about the same length together.

    A few answers a set make small batches, in which a token costs about as much as in large ones.

    Raises:
        ValueError: different `max_new_tokens`; the sets are of one model.
    """
    if not asked:
        return
    lengths = sorted({one.max_new_tokens for one in asked})
    if len(lengths) > 1:
        raise ValueError(f"`max_new_tokens` is {lengths} in sets that are answered together. Give all the same.")
    questions = [((i, row), pair) for i, one in enumerate(asked) for row, pair in enumerate(one.answered_pairs)]
    questions.sort(key=lambda question: len(question[1].prompt) + len(question[1].given))
    places, pairs = zip(*questions, strict=True)
    first = asked[0]
    texts = generate_answers(first.model, first.tokenizer, pairs, batch_size, first.max_new_tokens, desc="answers")
    found = dict(zip(places, texts, strict=True))
    for i, one in enumerate(asked):
        one.texts = [found[i, row] for row in range(len(one.answered_pairs))]


def require_wrong(name: str, pairs: Sequence[Pair]) -> None:
    """Raise a `ValueError` if a question of the set has no false answers."""
    missing = next((row for row, pair in enumerate(pairs) if not pair.wrong), None)
    if missing is not None:
        raise ValueError(
            f"The set {name!r} has no `wrong` answers in row {missing}, which truth_ratio and normalized_probability "
            "compare with the true one. Add them, or leave the metric out."
        )


def require_rephrased(name: str, pairs: Sequence[Pair]) -> None:
    """Raise a `ValueError` if some questions of the set, but not all, have the true answer in other words."""
    missing = next((row for row, pair in enumerate(pairs) if not pair.rephrased), None)
    if missing is not None and any(pair.rephrased for pair in pairs):
        raise ValueError(
            f"The set {name!r} has no `rephrased` answer in row {missing}, but others have one. Give it to all or to "
            "none: an answer that was learned by heart can't be compared with rephrased ones."
        )


def require_other_words(name: str, pairs: Sequence[Pair]) -> None:
    """Raise a `ValueError` if a question of the set lacks the true answer in other words."""
    missing = next((row for row, pair in enumerate(pairs) if not pair.rephrased), None)
    if missing is not None:
        raise ValueError(
            f"The set {name!r} has no `rephrased` answer in row {missing}, which rephrased_probability needs. "
            "Add it, or leave the metric out."
        )
