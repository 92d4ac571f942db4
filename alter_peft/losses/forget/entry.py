# SPDX-License-Identifier: Apache-2.0
"""What a forget loss is given, and what its entry says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..scores import TokenScores


class Inside(NamedTuple):
    """
    What the model has inside at the positions that predict the forget tokens.

    Attributes:
        hidden: the decoder's last hidden states, (n, k).
        head: maps hidden states (c, k) to logits (c, V).
        labels: the tokens themselves, (n,).
        base_hidden: the base model's, (n, k); `None` without the need `"base"`.
        base_head: the base model's head; where that does not learn it is the same.
        activations: what the layer at `activation_depth` gives, (n, k); `None` without the need `"activations"`.
        direction: where RMU sends them, of length 1, (k,).
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    labels: Tensor
    base_hidden: Tensor | None = None
    base_head: Callable[[Tensor], Tensor] | None = None
    activations: Tensor | None = None
    direction: Tensor | None = None

    @property
    def beside_base(self) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """
        Hidden states and heads, the model's own and the base's each.

        Raises:
            ValueError: the base's hidden states are not there.
        """
        if self.base_hidden is None:
            raise ValueError(
                "`base_hidden` is None, but the loss distils from the base model. Pass its hidden states."
            )
        return self.hidden, self.base_hidden, self.head, self.base_head or self.head


class ForgetBatch(NamedTuple):
    """
    The labelled tokens of a batch's forget rows, n tokens of R rows, and what was measured of the rows before.

    Of what was measured or made, all that the loss does not need (`ForgetLoss.needs`) is empty or `None`.

    Attributes:
        scores: see [`TokenScores`], (n,).
        rows: the row of each token, integers below R in ascending order, (n,).
        num_rows: R.
        targets: the mean log-probability that each row is to come to, in nats, (R,).
        profiles: the log-probabilities that its tokens are to come to, (n,): row after row, the least likely first.
        token_targets: the log-probability that each token itself is to come to, (n,).
        token_leads: how far each is to lead its strongest rival, in nats, (n,); `None` if that isn't known.
        reference: ln p of each row by the model before the training, the sum over its tokens, (R,).
        inside: hidden states, heads, activations.
        other_labels, label_probabilities: K labels for each token in place of its own, with their probabilities, or
            rivals, with their shares of what it gives up, (n, K).
        log_rivals: ln p of those labels by the model that is trained, (n, K), where they are rivals.
        alternates: the same rows with another answer each, a batch of its own, whose `reference` is measured.
    """

    scores: TokenScores
    rows: Tensor
    num_rows: int
    targets: Tensor
    profiles: Tensor
    reference: Tensor
    token_targets: Tensor = torch.empty(0)
    token_leads: Tensor | None = None
    inside: Inside | None = None
    other_labels: Tensor = torch.empty(0)
    label_probabilities: Tensor = torch.empty(0)
    log_rivals: Tensor = torch.empty(0)
    alternates: ForgetBatch | None = None

    @property
    def log_prob(self) -> Tensor:
        """ln p of each row, the sum over its tokens, (R,)."""
        return self.scores.log_prob.new_zeros(self.num_rows).index_add(0, self.rows, self.scores.log_prob)

    @property
    def sizes(self) -> Tensor:
        """|y|, how many tokens each row has, 1 at least, (R,)."""
        return torch.bincount(self.rows, minlength=self.num_rows).clamp(min=1)

    def row_means(self, losses: Tensor) -> Tensor:
        """The mean over each row of losses of its tokens, (R,)."""
        return losses.new_zeros(self.num_rows).index_add(0, self.rows, losses) / self.sizes

    @property
    def within(self) -> Inside:
        """
        `inside`.

        Raises:
            ValueError: it is not there.
        """
        if self.inside is None:
            raise ValueError("`inside` is None, but the loss is of hidden states. Pass them.")
        return self.inside

    @property
    def others(self) -> ForgetBatch:
        """
        `alternates`.

        Raises:
            ValueError: they are not there.
        """
        if self.alternates is None:
            raise ValueError("`alternates` is None, but the loss is of alternate answers. Pass their batch.")
        return self.alternates


@dataclass(frozen=True)
class ForgetLoss:
    """
    An entry of `FORGET_LOSSES`.

    Attributes:
        compute: the batch and the loss's options -> the loss of each token, (n,), or of each row, (R,).
        over: `"tokens"`, `"rows"` or `"alternate tokens"`: what the term is a mean of, over the whole step.
        caption: what it does, in a sentence.
        source: paper or code.
        low_entropy: whether it is of a row's low-entropy tokens alone, where an entropy is known (ALTER), as the
            paper's L_IHL is; else of whole answers.
        needs: what has to be measured of the rows, or made for them, before the training (docs/paper.md):
            `"targets"` (a level), `"profiles"`, `"token_targets"`, `"reference"`; `"base"`, the base model in every
            step; `"activations"` of a layer; other labels, `"rival_labels"`, `"random_labels"`, `"generic_labels"` or
            `"novice_labels"`; alternate answers, `"refusals"`, `"other_answers"`, `"own_alternates"` or
            `"novice_answers"`.
        options: name -> default of what `forget_loss_kwargs` may set, a number or a text.
        positive: those of the options that must be above 0.
        weight: what it is multiplied by beside `forget_weight`, as its source has it.
    """

    compute: Callable[[ForgetBatch, Mapping[str, Any]], Tensor]
    over: Literal["tokens", "rows", "alternate tokens"]
    caption: str
    source: str
    low_entropy: bool = False
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if "rival_labels" in self.needs and "token_targets" not in self.needs:
            raise ValueError(
                "`needs` has 'rival_labels' without 'token_targets', which say how much goes to them. Add it."
            )

    @property
    def has_targets(self) -> bool:
        """Whether it comes to rest where the forget rows are to come to, so that training can stop there."""
        return "targets" in self.needs

    @property
    def guesses_level(self) -> bool:
        """Whether it comes to a guess (general text, `forget_level`) where no unseen rows show a level."""
        return self.has_targets and "profiles" not in self.needs
