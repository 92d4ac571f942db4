# SPDX-License-Identifier: Apache-2.0
"""What an attack is given, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.model_on_set import ModelOnSet
from alter_peft.evaluation.scores import Key, Score


LEARNING_RATE = 1e-4  # of relearning: see `relearn`
ASKED = ("probability", "rouge")  # what attacks measure of the forget set, unless they are asked for something else


class Rows(NamedTuple):
    """
    What the attacks ask about and train on, and how.

    forget: the forget set.
    retain: rows that the model is to know still.
    holdout: rows of the same kind that neither the model nor the oracle has seen.
    paraphrased: the forget set with its questions in other words, if there is one.
    answered: how many questions are answered in full, for ROUGE-L; all by default.
    max_new_tokens: of such an answer; give what the other scores of the model were measured with.
    batch_size: rows of a pass and of a batch of answers; by default as for `ModelOnSet`, and 64 sampled answers.
    relearning_rate: the learning rate of an attacker who trains the model (see `relearn`).
    settings: of the forget set, for the scores, such as the file that it is from; and as `"holdout"` that of the
        holdout, for the attacks that need one.
    """

    forget: Sequence[Pair]
    retain: Sequence[Pair] = ()
    holdout: Sequence[Pair] = ()
    paraphrased: Sequence[Pair] = ()
    answered: int | None = None
    max_new_tokens: int = 40
    batch_size: int | None = None
    relearning_rate: float = LEARNING_RATE
    settings: Mapping[str, Any] | None = None

    def asked(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        attack: str,
        pairs: Sequence[Pair],
        name: str = "forget",
        step: float | None = None,
        **settings: Any,
    ) -> ModelOnSet:
        """A model that is asked a set of some of the rows under attack; its scores depend on `settings`, too."""
        own = {**(self.settings or {}), **settings}
        return ModelOnSet(
            model, tokenizer, name, pairs, True, self.answered, self.max_new_tokens, self.batch_size,
            attack=attack, step=step, settings=own,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attack:
    """
    A way to get back what was forgotten.

    Attributes:
        run: model, tokenizer and rows -> scores. The model is left as it was.
        caption: what the attacker does, in one sentence.
        needs: `"holdout"` rows, an `"adapter"`, `"two rows"` to forget.
        left_out: what of it does not apply to a model and rows, `"{attack}/{set}"`, or the whole attack by its name ->
            why.
        plain: what a plain model, such as an oracle, has in the place of an attack that needs an adapter.
        control: of such an attack the key of an oracle's score that takes the place of one under attack, if any does.
        metrics: of the scores that no metric of `METRICS` makes.
        packages: that it needs beside those of the package.
    """

    run: Callable[[Any, PreTrainedTokenizerBase, Rows], list[Score]]
    caption: str
    needs: tuple[str, ...] = ()
    left_out: Callable[[Any, Rows], dict[str, str]] = lambda model, rows: {}
    plain: str = ""
    control: Callable[[Key], Key | None] = lambda key: None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
