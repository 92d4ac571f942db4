# SPDX-License-Identifier: Apache-2.0
"""What a model that knows less of the rows to forget would say in their tokens' places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alter_peft.entropy import log_probabilities
from alter_peft.losses import TokenScores
from alter_peft.losses.forget.tokens import BEHIND
from alter_peft.losses.scores import scores_within
from alter_peft.scoring import Row, ScoredModel


COUNT = 16  # of a token; on TOFU's rows they have two thirds of what an oracle has beside the label
CHUNK = 256  # tokens whose logits are held at once
FIRST = 0.99  # the most that the first of them is given


class Rivals(NamedTuple):
    """
    The most likely tokens in place of each label of a row.

    labels: most likely first, int32 (n, K), K = 16, or V - 1 if that is less.
    shares: of the probability that the label gives up, those of a token add up to 1, (n, K).
    """

    labels: Tensor
    shares: Tensor

    def led(self, log_prob: Tensor, lead: Tensor) -> Rivals:
        """
        With the first rival as far before the label as that is to be behind; the others have less in proportion.

        The first choice of a reference or a damped model may have less than the label is to keep, where the lead says
        that it has more: the two could not be reached together.

        Args:
            log_prob: ln q_t of the labels, (n,).
            lead: m_t, how far each is to lead its strongest rival, in nats, (n,); from 0 on it asks for nothing.
        """
        q, first = log_prob.exp(), self.shares[:, 0]
        wanted = q * (-lead.clamp(min=-BEHIND)).exp() / (1 - q).clamp(min=1e-6)
        raised = torch.where(lead < 0, torch.maximum(first, wanted.clamp(max=FIRST)), first)
        left = (1 - raised) / (1 - first).clamp(min=1e-6)
        return Rivals(self.labels, torch.cat([raised.unsqueeze(-1), self.shares[:, 1:] * left.unsqueeze(-1)], dim=-1))


class ScoredRivals(NamedTuple):
    """
    scores: of each row's labels, (n_i,).
    rivals: of each row.
    """

    scores: list[TokenScores]
    rivals: list[Rivals]


@torch.no_grad()
def scores_and_rivals(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, vocab_size: int, temperature: float = 1.0
) -> tuple[TokenScores, Rivals]:
    """
    The scores of labels, and the tokens that are most likely in their places.

    Args:
        hidden: final hidden states, (n, k).
        head: hidden states (c, k) to logits (c, V).
        labels: x_t, (n,).
        vocab_size: of the model that is trained; a reference may have more tokens.
        temperature: divides the rivals' log-probabilities.
    """
    scores, rivals = [], []
    for rows, label in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        log_p = log_probabilities(head(rows))
        scores.append(TokenScores(*(part.float() for part in scores_within(log_p, label))))
        others = log_p.scatter(-1, label.unsqueeze(-1), -math.inf)[:, :vocab_size]
        top = others.topk(min(COUNT, others.shape[-1] - 1), dim=-1)
        rivals.append(Rivals(top.indices.int(), (top.values / temperature).softmax(dim=-1).float()))
    return (
        TokenScores(*(torch.cat(parts) for parts in zip(*scores, strict=True))),
        Rivals(*(torch.cat(parts) for parts in zip(*rivals, strict=True))),
    )


def score_with_rivals(
    scored: ScoredModel,
    rows: Sequence[Row],
    batch_size: int,
    vocab_size: int | None,
    temperature: float = 1.0,
    **options: Any,
) -> ScoredRivals:
    """
    Scores and rivals of each row's labels, on the CPU, in one pass, with `options` of [`ScoredModel.passes`].

    Args:
        vocab_size, temperature: see [`scores_and_rivals`]; without the former no rivals are looked for.
    """
    if vocab_size is None:
        return ScoredRivals(scored.label_scores(rows, batch_size, by_length=False, **options), [])
    found: dict[int, tuple[TokenScores, Rivals]] = {}
    for batch in scored.passes(rows, batch_size, by_length=False, **options):
        scores, rivals = scores_and_rivals(batch.hidden, scored.head, batch.labels, vocab_size, temperature)
        parts = [[part for _, part in batch.split(values)] for values in (*scores, *rivals)]
        for place, *of_row in zip(batch.rows, *parts, strict=True):
            found[place] = TokenScores(*of_row[:2]), Rivals(*of_row[2:])
    in_order = [found[place] for place in range(len(rows))]
    return ScoredRivals([scores for scores, _ in in_order], [rivals for _, rivals in in_order])
