# SPDX-License-Identifier: Apache-2.0
"""Two-sided losses of single tokens: each comes to a probability of its own, and what it loses goes where it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alter_peft.entropy import divergence, log_probabilities, map_row_chunks

from ..scores import TokenScores


Head = Callable[[Tensor], Tensor]
SURE, BEHIND = 0.9, 2.0


def token_loss(scores: TokenScores, targets: Tensor, leads: Tensor | None = None) -> Tensor:
    """Bring every token's log-odds to those of its target, and its rival before it where it is to have one.

    huber(logit p(x_t) - logit q_t), with ln q_t the target and logit p = ln p - ln(1 - p); linear beyond half a nat
    and quadratic within. Not in the paper. Its gradient in the label's logit is 1 beyond half a nat, at any p: a token
    that is known by heart, where that of ln p is 1 - p, gives way as fast as others, and one of probability .01, where
    that of [`soft_target_loss`] is below .01, is pulled as hard. A token whose target is .9 or above is at rest
    from .9 on: whether text that anyone could predict has .99 or .999 tells nobody anything.

    What a label gives up spreads thinly over all others, so that at a probability of .2 it is still the first choice,
    where a model that never saw the text has another. With `leads`, a token that is to be behind its strongest rival,
    m_t = ln q_t - ln q_v < 0, has beside this the hinge huber(max(0, ln p(x_t) - max_{v != x_t} ln p(v) - m_t)), which
    is at rest once the rival leads by so much (by two nats at most): L_IHL of Eq. 8 with a margin of its own for each
    token, for those alone that are to give way.

    Args:
        scores: see [`score_tokens`].
        targets: ln q_t, the log-probability to reach, one a token, in nats, shape (n,).
        leads: m_t, in nats, shape (n,); those of 0 and above ask for nothing. None: no hinge.

    Returns:
        The loss of each token, shape (n,): in nats beyond half a nat from its target, and from its place behind the
        rival.

    Raises:
        ValueError: if `targets` or `leads` are not as many as the tokens.
    """
    check_targets(targets, scores.log_prob)
    top = math.log(SURE / (1 - SURE))
    aim = targets.to(scores.log_prob.dtype)
    wanted = (aim - _complement(aim).log()).clamp(max=top)
    with torch.no_grad():
        rest = _complement(scores.log_prob)
    # ln(1 - p) has no value left to differentiate as p -> 1; the slope of ln p - ln(1 - p) is that of ln p over 1 - p
    reached = scores.log_prob.detach() - rest.log() + (scores.log_prob - scores.log_prob.detach()) / rest
    reached = torch.where(wanted < top, reached, reached.clamp(max=top))
    loss = F.smooth_l1_loss(reached, wanted, reduction="none", beta=0.5)
    if leads is None:
        return loss
    check_targets(leads, scores.log_prob, "leads")
    margin = leads.to(scores.log_prob.dtype).clamp(min=-BEHIND)
    too_far = (scores.log_prob - scores.log_rival - margin).relu() * (margin < 0)
    return loss + F.smooth_l1_loss(too_far, torch.zeros_like(too_far), reduction="none", beta=0.5)


def soft_target_loss(
    hidden: Tensor, head: Head, labels: Tensor, targets: Tensor, rivals: Tensor, shares: Tensor, chunk_size: int = 256
) -> Tensor:
    """Divergence from a distribution of the label at its target and of rivals that share what it gives up.

    KL(q_t || p) with q_t(x_t) the target and q_t(v_k) = (1 - q_t(x_t)) s_k, all other tokens having nothing. Where
    [`token_loss`] leaves to the training where the label's probability goes, this says it, so that free answers stay
    fluent. Its gradient in the logits is p - q_t: bounded, two-sided, and not vanishing on a token that is known by
    heart. Not in the paper; UNDIAL, arXiv:2402.10052, has a distribution as well, the base model's own with the
    label's logit lowered.

    Args:
        hidden: final hidden states, (n, k).
        head: hidden states (c, k) to logits (c, V).
        labels: x_t, (n,).
        targets: ln q_t(x_t), in nats, (n,).
        rivals: v_k, K tokens other than the label, (n, K).
        shares: s_k, which add up to 1, (n, K).
        chunk_size: the most rows given to the head at once, in forward and in backward's recomputation.

    Returns:
        The loss of each token in nats, (n,).

    Raises:
        ValueError: if `targets`, `rivals` or `shares` are not as many as the labels.
    """
    for name, values in (("targets", targets), ("rivals", rivals), ("shares", shares)):
        check_targets(values, labels, name)

    def divergence_of(rows: Tensor, label: Tensor, target: Tensor, rival: Tensor, share: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        aim = target.to(log_p.dtype).unsqueeze(-1)
        log_q = torch.cat([aim, _complement(aim).log() + share.to(log_p.dtype).log()], dim=-1)
        return divergence(log_q, log_p.gather(-1, torch.cat([label.unsqueeze(-1), rival.long()], dim=-1)))

    return map_row_chunks(divergence_of, chunk_size, hidden, labels, targets, rivals, shares)


def check_targets(targets: Tensor, tokens: Tensor, name: str = "targets") -> None:
    """Raise a `ValueError` if targets are not as many as the tokens."""
    if len(targets) != len(tokens):
        raise ValueError(f"{name} has {len(targets)} values for {len(tokens)} tokens; give one for each.")


def _complement(log_prob: Tensor) -> Tensor:
    """1 - p, 1e-6 at least, below which float32 has none."""
    return -torch.expm1(log_prob).clamp(max=-1e-6)
