# SPDX-License-Identifier: Apache-2.0
"""What the losses need of each labelled token, in chunks of rows, so that no V-sized tensor exists for all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alter_peft.entropy import log_probabilities, map_row_chunks


class TokenScores(NamedTuple):
    """What the losses need of each token's distribution, in nats.

    Attributes:
        log_prob: ln p(x_t), the label's log-probability, shape (n,).
        log_rival: ln max_{v != x_t} p(v), that of the most likely other token, shape (n,).
    """

    log_prob: Tensor
    log_rival: Tensor


def score_tokens(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk_size: int = 256
) -> TokenScores:
    """Log-probabilities of the labels and of their strongest rivals.

    Args:
        hidden: final hidden states at the scored positions, shape (n, k); n may be 0.
        head: maps hidden states (c, k) to logits (c, V), V at least 2.
        labels: x_t, the token that each position predicts, shape (n,), each in [0, V): drop ignored ones before.
        chunk_size: the most rows given to `head` at once, in forward and in backward's recomputation.

    Returns:
        The scores, in float32, or float64 for float64 logits.

    Raises:
        ValueError: if `hidden` and `labels` differ in length, or `chunk_size` is below 1.
    """

    def score(rows: Tensor, label: Tensor) -> Tensor:
        return torch.stack(scores_within(log_probabilities(head(rows)), label), dim=-1)

    return TokenScores(*map_row_chunks(score, chunk_size, hidden, labels).unbind(-1))


def score_tokens_and_others(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, others: Tensor, chunk_size: int = 256
) -> tuple[TokenScores, Tensor]:
    """[`score_tokens`], and log-probabilities of other tokens at the same positions, from one pass of the head.

    Args:
        hidden, head, labels, chunk_size: as there.
        others: K tokens for each position, in [0, V), (n, K).

    Returns:
        The scores, and ln p of the other tokens, (n, K).

    Raises:
        ValueError: as there, and if `others` is not of as many positions.
    """

    def score(rows: Tensor, label: Tensor, other: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        return torch.cat([torch.stack(scores_within(log_p, label), dim=-1), log_p.gather(-1, other)], dim=-1)

    found = map_row_chunks(score, chunk_size, hidden, labels, others)
    return TokenScores(*found[:, :2].unbind(-1)), found[:, 2:]


def scores_within(log_p: Tensor, labels: Tensor) -> TokenScores:
    """The scores of labels (n,) within log-probabilities of all tokens, (n, V)."""
    top = log_p.topk(2, dim=-1)
    log_rival = torch.where(top.indices[:, 0] == labels, top.values[:, 1], top.values[:, 0])
    return TokenScores(log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), log_rival)
