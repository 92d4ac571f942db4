# SPDX-License-Identifier: Apache-2.0
"""What a task says of itself, and how a model is measured on one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from alter_peft.chat import chat_or_plain
from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.attacks.attack import Rows
from alter_peft.evaluation.metrics import measure, measure_guards
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.model_on_set import ModelOnSet
from alter_peft.evaluation.scores import Score, Scores


@dataclass(frozen=True)
class QuestionSet:
    """
    Questions that a model is asked, and the metrics of its answers.

    Attributes:
        name: of the set in the scores.
        metrics: names of `METRICS`.
        is_forget: whether the set is to be forgotten.
        is_guarded: whether guards are measured of it as well, where they are asked for.
        max_new_tokens, batch_size: of the task's own; by default the caller's.
        all_answered: whether all questions are answered in full, however many the caller wants.
    """

    name: str
    pairs: Sequence[Pair]
    metrics: Sequence[str]
    is_forget: bool = False
    is_guarded: bool = False
    max_new_tokens: int | None = None
    batch_size: int | None = None
    all_answered: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """
    A task that was read: what is to be forgotten, what is kept, and what a model is asked.

    Attributes:
        forget: the rows to be forgotten. A target is trained on these, on `retain` and on `bystanders`, an oracle on
            the last two.
        retain: the rows that a method is given to keep.
        bystanders: rows that target and oracles know and no method is given: nobody asked to forget them.
        calibration, holdout: rows like `forget` that no model is trained on. Methods may measure the level of unseen
            text on the first; the second is for membership inference alone.
        paraphrased: `forget` with its questions in other words, if there is that.
        settings: what the scores depend on, for comparisons.
        asked: what a model is asked, where `question_sets` does not follow from the rows.
        as_chat: whether questions are turns of a chat (see `chat_or_plain`); `False` of plain text.
    """

    forget: list[Pair] = field(default_factory=list)
    retain: list[Pair] = field(default_factory=list)
    bystanders: list[Pair] = field(default_factory=list)
    calibration: list[Pair] = field(default_factory=list)
    holdout: list[Pair] = field(default_factory=list)
    paraphrased: list[Pair] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    asked: Sequence[QuestionSet] = ()
    as_chat: ClassVar[bool | None] = None

    @property
    def question_sets(self) -> list[QuestionSet]:
        """What a model is asked."""
        return [*self.asked]

    @property
    def kept_sets(self) -> dict[str, Sequence[Pair]]:
        """What a model is to know still, by the name of its set: asked after each of several requests."""
        return {"retain": self.retain}

    @property
    def bystander_sets(self) -> dict[str, Sequence[Pair]]:
        """What is asked of the bystanders, by the name of its set."""
        return {}

    def other_scores(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> Sequence[Score]:
        """Scores that no metric of `METRICS` gives."""
        return []

    def computed_scores(self, scores: Scores) -> Sequence[Score]:
        """Scores that are computed from all others."""
        return []

    def training_rows(self, pairs: Sequence[Pair]) -> Dataset:
        """Some of the rows as the trainers take them."""
        return Dataset.from_list([{"prompt": pair.prompt, "completion": pair.completion} for pair in pairs])

    @property
    def forget_rows(self) -> Dataset:
        """`forget` as rows of [`AlterUnlearnTrainer`]."""
        return self.training_rows(self.forget)

    @property
    def retain_rows(self) -> Dataset:
        """`retain` as rows of [`AlterUnlearnTrainer`]."""
        return self.training_rows(self.retain)

    @property
    def calibration_rows(self) -> Dataset:
        """`calibration` as rows of [`AlterUnlearnTrainer`]."""
        return self.training_rows(self.calibration)

    def attack_rows(self, **options: Any) -> Rows:
        """What the attacks ask about, and how: `options` of [`Rows`]."""
        return Rows(self.forget, self.retain, self.holdout, self.paraphrased, settings=self.settings, **options)


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    A benchmark that a model can be measured on.

    Attributes:
        read: the model's tokenizer, and arguments of the task's own by name -> its data.
        caption: what it is, in one sentence.
        packages: that it needs beside those of the package.
        is_attacked: whether attacks are made on what it has to forget: questions.
        metrics: of the scores that no metric of `METRICS` makes.
    """

    read: Callable[..., TaskData]
    caption: str
    packages: tuple[str, ...] = ()
    is_attacked: bool = True
    metrics: Mapping[str, Metric] = field(default_factory=dict)


def measure_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    answered: int | None = None,
    max_new_tokens: int = 200,
    batch_size: int | None = None,
    judge: Any = None,
    guards: bool = False,
) -> Scores:
    """
    All that a task measures of a model.

    In eval mode, and in the precision of the context, as `score_answers`. What needs other models is in
    `compare_with_oracles`: forget quality, membership, PrivLeak, and the distance of each score.

    Args:
        answered, batch_size: as for `ModelOnSet`.
        max_new_tokens: of an answer; 200 as in open-unlearning. Some tasks have a length of their own.
        judge: of fluency; by default the model without its adapters.
        guards: whether guards are measured, too.
    """
    asking, scores = chat_or_plain(tokenizer, data.as_chat), Scores()
    for one in tqdm(data.question_sets, disable=None, leave=False):
        asked = ModelOnSet(
            model, asking, one.name, one.pairs, one.is_forget, None if one.all_answered else answered,
            one.max_new_tokens or max_new_tokens, batch_size or one.batch_size, judge, settings=data.settings,
        )  # fmt: skip
        scores.add(measure(asked, one.metrics))
        if guards and one.is_guarded:
            scores.add(measure_guards(asked))
    scores.add(data.other_scores(model, tokenizer, batch_size))
    scores.add(data.computed_scores(scores))
    return scores
