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
    hidden: Tensor,
    base_hidden: Tensor,
    head: Head,
    base_head: Head,
    labels: Tensor,
    targets: Tensor,
    chunk_size: int = 256,
) -> Tensor:
    """Divergence from the base model's distribution in which the label alone has another probability.

    KL(q_t || p) with q_t(x_t) the target, and q_t(v) = (1 - q_t(x_t)) p_base(v) / (1 - p_base(x_t)) for all others:
    what the label gives up goes to what the base model would have said in its place, so that free answers stay fluent.
    Its gradient in the logits is p - q_t: bounded, two-sided, and not vanishing on a token that is known by heart.
    UNDIAL, arXiv:2402.10052, is of this form, with the label's logit lowered by a constant.

    Args:
        hidden, base_hidden: final hidden states of the model and of its base, (n, k).
        head, base_head: hidden states (c, k) to logits (c, V), of each.
        labels: x_t, (n,).
        targets: ln q_t(x_t), in nats, (n,).
        chunk_size: the most rows given to a head at once, in forward and in backward's recomputation.

    Returns:
        The loss of each token in nats, (n,). No gradient flows into the base's side.

    Raises:
        ValueError: if `targets` are not as many as the labels.
    """
    check_targets(targets, labels)

    def from_targets(rows: Tensor, base_rows: Tensor, label: Tensor, target: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        with torch.no_grad():
            log_q = soft_targets(base_head(base_rows), label, target).to(log_p.dtype)
        return divergence(log_q, log_p)

    return map_row_chunks(from_targets, chunk_size, hidden, base_hidden, labels, targets)


def soft_targets(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """
    ln q_t of [`soft_target_loss`], (n, V), in float32, or float64 for float64 logits.

    Args:
        logits: the base model's, (n, V).
        labels: x_t, (n,).
        targets: ln q_t(x_t), (n,).
    """
    place = labels.unsqueeze(-1)
    others = log_probabilities(logits.scatter(-1, place, -math.inf))
    aim = targets.to(others.dtype).unsqueeze(-1)
    return (others + _complement(aim).log()).scatter(-1, place, aim)


def check_targets(targets: Tensor, tokens: Tensor, name: str = "targets") -> None:
    """Raise a `ValueError` if targets are not as many as the tokens."""
    if len(targets) != len(tokens):
        raise ValueError(f"{name} has {len(targets)} values for {len(tokens)} tokens; give one for each.")


def _complement(log_prob: Tensor) -> Tensor:
    """1 - p, 1e-6 at least, below which float32 has none."""
    return -torch.expm1(log_prob).clamp(max=-1e-6)
