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
from alter_peft.losses.scores import scores_within
from alter_peft.scoring import Row, ScoredModel


COUNT = 16  # of a token; on TOFU's rows they have two thirds of what an oracle has beside the label
CHUNK = 256  # tokens whose logits are held at once


class Rivals(NamedTuple):
    """
    The most likely tokens in place of each label of a row.

    labels: most likely first, int32 (n, K), K = 16, or V - 1 if that is less.
    shares: of the probability that the label gives up, those of a token add up to 1, (n, K).
    """

    labels: Tensor
    shares: Tensor


class Ranked(NamedTuple):
    """
    scores: of each row's labels, (n_i,).
    rivals: of each row.
    """

    scores: list[TokenScores]
    rivals: list[Rivals]


@torch.no_grad()
def rank(
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
        scores.append(scores_within(log_p, label))
        others = log_p.scatter(-1, label.unsqueeze(-1), -math.inf)[:, :vocab_size]
        top = others.topk(min(COUNT, others.shape[-1] - 1), dim=-1)
        rivals.append(Rivals(top.indices.int(), (top.values / temperature).softmax(dim=-1)))
    return (
        TokenScores(*(torch.cat(parts) for parts in zip(*scores, strict=True))),
        Rivals(*(torch.cat(parts) for parts in zip(*rivals, strict=True))),
    )


def score_with_rivals(
    scored: ScoredModel,
    rows: Sequence[Row],
    batch_size: int,
    vocab_size: int,
    temperature: float = 1.0,
    **options: Any,
) -> Ranked:
    """
    Scores and rivals of each row's labels, on the CPU, in one pass, with `options` of [`ScoredModel.passes`].

    Args:
        vocab_size, temperature: see [`rank`].
    """
    found = Ranked(
        [TokenScores(torch.empty(0), torch.empty(0))] * len(rows), [Rivals(*[torch.empty(0)] * 2)] * len(rows)
    )
    for batch in scored.passes(rows, batch_size, by_length=False, **options):
        scores, rivals = rank(batch.hidden, scored.head, batch.labels, vocab_size, temperature)
        parts = [batch.split(values) for values in (*scores, *rivals)]
        for (place, log_prob), (_, log_rival), (_, labels), (_, shares) in zip(*parts, strict=True):
            found.scores[place] = TokenScores(log_prob.float(), log_rival.float())
            found.rivals[place] = Rivals(labels, shares.float())
    return found
