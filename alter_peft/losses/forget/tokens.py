# SPDX-License-Identifier: Apache-2.0
"""Two-sided losses of single tokens: each comes to a probability of its own, and others get what it gives up."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alter_peft.entropy import divergence

from ..scores import TokenScores


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


def soft_target_loss(log_prob: Tensor, log_rivals: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """Divergence from a distribution of the label at its target and of rivals that share what it gives up.

    KL(q_t || p) with q_t(x_t) the target and q_t(v_k) = (1 - q_t(x_t)) s_k, all other tokens having nothing. Where
    [`token_loss`] leaves to the training where the label's probability goes, this says it, so that free answers stay
    fluent. It is of every token: where a label keeps nearly all, little is left for its rivals. Its gradient in the
    logits is p - q_t: bounded, two-sided, and not vanishing on a token that is known by heart. Not in the paper;
    UNDIAL, arXiv:2402.10052, has a distribution as well, the base model's own with the label's logit lowered.

    Args:
        log_prob: ln p(x_t), the label's, in nats, (n,).
        log_rivals: ln p(v_k) of K other tokens, (n, K).
        targets: ln q_t(x_t), in nats, (n,).
        shares: s_k, which add up to 1, (n, K).

    Returns:
        The loss of each token in nats, (n,).

    Raises:
        ValueError: if `log_rivals`, `targets` or `shares` are not as many as the labels.
    """
    for name, values in (("log_rivals", log_rivals), ("targets", targets), ("shares", shares)):
        check_targets(values, log_prob, name)
    aim = targets.to(log_prob.dtype).unsqueeze(-1)
    log_q = torch.cat([aim, _complement(aim).log() + shares.to(log_prob.dtype).log()], dim=-1)
    return divergence(log_q, torch.cat([log_prob.unsqueeze(-1), log_rivals], dim=-1))


def check_targets(targets: Tensor, tokens: Tensor, name: str = "targets") -> None:
    """Raise a `ValueError` if targets are not as many as the tokens."""
    if len(targets) != len(tokens):
        raise ValueError(f"{name} has {len(targets)} values for {len(tokens)} tokens; give one for each.")


def _complement(log_prob: Tensor) -> Tensor:
    """1 - p, 1e-6 at least, below which float32 has none."""
    return -torch.expm1(log_prob).clamp(max=-1e-6)
