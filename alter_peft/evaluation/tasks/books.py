# SPDX-License-Identifier: Apache-2.0
"""The copyright benchmark: what a model recites of a book and knows of it, after MUSE and the Harry Potter tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics.membership import privleak
from alter_peft.evaluation.metrics.text import KNOWMEM_TOKENS
from alter_peft.evaluation.oracle import AUC, SIMILARITIES, min_k_auc, similarity_gap
from alter_peft.evaluation.scores import Score, Scores

from .task import QuestionSet, TaskData


@dataclass(frozen=True, kw_only=True)
class BookData(TaskData):
    """
    Passages and questions of the benchmark. The text of a passage is its prompt followed by its completion.

    A model is asked greedily and as plain text, whatever template there is.

    Attributes:
        name: of the book to be forgotten.
        length: tokens of a prompt and of a completion, each.
        forget_questions, retain_questions: with short answers; the prompts carry the examples that show the form.

    References:
        Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", arXiv 2407.06460.
    """

    name: str
    length: int
    forget_questions: list[Pair]
    retain_questions: list[Pair]
    as_chat = False

    @property
    def question_sets(self) -> list[QuestionSet]:
        """Continuations of passages, answers to questions, and whole passages but for their first word."""
        both = (("forget", self.forget, self.forget_questions), ("retain", self.retain, self.retain_questions))
        continued = [
            QuestionSet(
                name, passages, ("verbmem", "rouge_f", "bleu"), name == "forget", is_guarded=True,
                max_new_tokens=self.length, batch_size=BATCH_SIZE,
            )
            for name, passages, _ in both
        ]  # fmt: skip
        answered = [
            QuestionSet(
                name, questions, ("knowmem",), name == "forget", max_new_tokens=KNOWMEM_TOKENS, batch_size=BATCH_SIZE,
                all_answered=True,
            )
            for name, _, questions in both
            if questions
        ]  # fmt: skip
        scored = [
            QuestionSet(name, list(map(_whole, passages)), ("min_k", "exact_memorization"), name == "forget")
            for name, passages in (("forget", self.forget), ("retain", self.retain), ("holdout", self.holdout))
        ]
        return [*continued, *answered, *scored]

    def computed_scores(self, scores: Scores) -> list[Score]:
        """The AUC of membership inference."""
        return [min_k_auc(scores)]

    def training_rows(self, pairs: Sequence[Pair]) -> Dataset:
        """
        Whole passages as rows with the column `text`, which the trainers of TRL and ours take.

        Not `prompt` and `completion`, for two reasons. A tokenizer with a chat template would make these turns of a
        chat (`as_chat`), and a book is no chat: it is learned, forgotten and asked for as plain text. And their prompt
        would have no loss, so that half of the book would neither be learned nor forgotten. TRL appends EOS to each
        row.
        """
        return Dataset.from_dict({"text": [passage.prompt + passage.completion for passage in pairs]})

    @property
    def forget_rows(self) -> Dataset:
        """`forget` as rows of [`AlterUnlearnTrainer`], one sub-domain: the book."""
        return self.training_rows(self.forget).add_column("domain", [self.name] * len(self.forget))


BATCH_SIZE = 8  # of answers, which are long


def _whole(passage: Pair) -> Pair:
    """All of the passage's text to be scored but for its first word, which nothing precedes."""
    text = passage.prompt + passage.completion
    first = re.match(r"\s*\S+", text)
    end = first.end() if first else 0
    return Pair(text[:end], text[end:])


def compare_books(scores: Scores, oracles: Sequence[Scores]) -> list[Score]:
    """
    Beside models that never saw the forget book: `forget/similarity_gap` (see `similarity_gap`) and `forget/privleak`
    (see `privleak`), 0 for an oracle. The oracle's level is the mean over the oracles.

    Raises:
        ValueError: there is no oracle, or a score is missing.
    """
    if not oracles:
        raise ValueError("`oracles` is empty: give the scores of at least one model that never saw the forget book.")
    missing = [key for key in (*SIMILARITIES, AUC) if any(key not in found for found in (scores, *oracles))]
    if missing:
        raise ValueError(f"The score '{missing[0]}' is missing of the model or of an oracle. Measure both.")
    leak = privleak(scores[AUC].value, [oracle[AUC].value for oracle in oracles])
    return [
        Score("forget", "similarity_gap", similarity_gap(scores, oracles), average="other"),
        Score("forget", "privleak", leak, average="other"),
    ]
