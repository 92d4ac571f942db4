# SPDX-License-Identifier: Apache-2.0
"""What a forget loss is given, and what its entry says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..scores import TokenScores


class ForgetBatch(NamedTuple):
    """
    The labelled tokens of a batch's forget rows, n tokens of R rows, and what was measured of the rows before.

    Of what was measured, all that the loss does not need (`ForgetLoss.needs`) is empty.

    Attributes:
        scores: see [`TokenScores`], (n,).
        rows: the row of each token, integers below R in ascending order, (n,).
        num_rows: R.
        targets: the mean log-probability that each row is to come to, in nats, (R,).
        profiles: the log-probabilities that its tokens are to come to, (n,): row after row, the least likely first.
        reference: ln p of each row by the model before the training, the sum over its tokens, (R,).
    """

    scores: TokenScores
    rows: Tensor
    num_rows: int
    targets: Tensor
    profiles: Tensor
    reference: Tensor

    @property
    def log_prob(self) -> Tensor:
        """ln p of each row, the sum over its tokens, (R,)."""
        return self.scores.log_prob.new_zeros(self.num_rows).index_add(0, self.rows, self.scores.log_prob)

    @property
    def sizes(self) -> Tensor:
        """|y|, how many tokens each row has, 1 at least, (R,)."""
        return torch.bincount(self.rows, minlength=self.num_rows).clamp(min=1)


@dataclass(frozen=True)
class ForgetLoss:
    """
    An entry of `FORGET_LOSSES`.

    Attributes:
        compute: the batch and the loss's options -> the loss of each token, (n,), or of each row, (R,).
        over: `"tokens"` or `"rows"`: what the term is a mean of, over the whole step.
        caption: what it does, in a sentence.
        source: paper or code.
        low_entropy: whether it is of a row's low-entropy tokens alone, where an entropy is known (ALTER), as the
            paper's L_IHL is; else of whole answers.
        needs: what has to be measured of the rows before the training: `"targets"` (a level), `"profiles"`,
            `"reference"`.
        options: name -> default of what `forget_loss_kwargs` may set.
        positive: those of the options that must be above 0.
        weight: what it is multiplied by beside `forget_weight`, as its source has it.
    """

    compute: Callable[[ForgetBatch, Mapping[str, float]], Tensor]
    over: Literal["tokens", "rows"]
    caption: str
    source: str
    low_entropy: bool = False
    needs: frozenset[str] = frozenset()
    options: Mapping[str, float] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    weight: float = 1.0

    @property
    def has_targets(self) -> bool:
        """Whether it comes to rest where the forget rows are to come to, so that training can stop there."""
        return "targets" in self.needs
