# SPDX-License-Identifier: Apache-2.0
"""What the tokens of a batch are, how many of them each term of the loss is a mean of, and what is logged of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alter_peft.entropy import entropy_masks
from alter_peft.losses import ForgetLoss, TokenScores


class TokenMasks(NamedTuple):
    """
    Kinds of tokens in a batch, each bool (B, T-1); position t is for the label at t + 1.

    `forget` are those of forget rows, `alternate` of the same rows with another answer, which are none of the former.
    """

    labelled: Tensor
    forget: Tensor
    low: Tensor
    high: Tensor
    alternate: Tensor

    def given(self, loss: ForgetLoss) -> Tensor:
        """The tokens of forget rows that a forget loss is given, bool (B, T-1)."""
        return (self.low if loss.low_entropy else self.labelled) & self.forget

    def aimed(self, loss: ForgetLoss) -> Tensor:
        """The tokens that a forget loss is a mean over, bool (B, T-1)."""
        return self.others if loss.over == "alternate tokens" else self.given(loss)

    @property
    def others(self) -> Tensor:
        """The labelled tokens of alternate answers, bool (B, T-1)."""
        return self.labelled & self.alternate

    @property
    def kept(self) -> Tensor:
        """The labelled tokens of the retain rows, bool (B, T-1)."""
        return self.labelled & ~self.forget & ~self.alternate


def token_masks(batch: dict[str, Tensor], threshold: float | None) -> TokenMasks:
    """
    Labelled tokens, those of forget rows, and which of the labelled ones have low and high entropy.

    Args:
        batch: with `labels` (B, T), `expert` (B,), 0 for a retain row, and `entropy` (B, T) unless `threshold` is
            `None`: then no entropy is known, and all tokens count as low. `alternate` (B,), if it is there, says which
            rows have another answer.
    """
    labelled = batch["labels"][:, 1:] != -100
    expert = batch["expert"].unsqueeze(1).expand_as(labelled)
    alternate = torch.zeros_like(labelled)
    if "alternate" in batch:
        alternate = batch["alternate"].unsqueeze(1).expand_as(labelled)
    forget = (expert > 0) & ~alternate
    if threshold is None:
        return TokenMasks(labelled, forget, labelled, torch.zeros_like(labelled), alternate)
    return TokenMasks(labelled, forget, *entropy_masks(batch["entropy"][:, :-1], labelled, threshold), alternate)


def without_rows(batch: dict[str, Tensor], left_out: Tensor) -> dict[str, Tensor]:
    """
    The other rows of a batch, as wide as before, so that masks of it fit.

    Args:
        left_out: bool (B,).
    """
    return {name: values[~left_out] for name, values in batch.items()}


def count_terms(
    batch: dict[str, Tensor], masks: TokenMasks, loss: ForgetLoss, weights: tuple[float, float], num_experts: int
) -> Tensor:
    """
    What the forget and the retain term of a batch are sums over, and rows that each expert learns from.

    Args:
        weights: of the forget and the retain term; a term of weight 0 teaches nothing.
        num_experts: 1 + N.

    Returns:
        (2 + 1 + N,), float.
    """
    aimed, kept = masks.aimed(loss), masks.kept
    learns = aimed.any(dim=1) & (weights[0] > 0) | kept.any(dim=1) & (weights[1] > 0)
    rows = torch.bincount(batch["expert"][learns], minlength=num_experts)
    of_forget = aimed.any(dim=1).sum() if loss.over == "rows" else aimed.sum()
    return torch.cat([torch.stack([of_forget, kept.sum()]), rows]).float()


@torch.no_grad()
def token_sums(scores: TokenScores, masks: TokenMasks, experts: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
    """
    What is logged of a batch, as sums over its answer tokens, so that batches and processes add up.

    Args:
        experts: (B,), the expert that each row belongs to.
        gates: (B, T, 1+N), or `None` without a router.
    """
    labelled, forget, low, high, _ = masks
    kept = masks.kept
    p = scores.log_prob.exp()
    sums = {
        "low": (low & forget).sum(),
        "high": (high & forget).sum(),
        "retain": kept.sum(),
        "probability/forget": p[forget[labelled]].sum(),
        "probability/retain": p[kept[labelled]].sum(),
    }
    if gates is not None:
        astray = labelled & (gates[:, :-1].argmax(dim=-1) != experts.unsqueeze(1))
        sums["router/forget_astray"] = (astray & forget).sum()
        sums["router/retain_astray"] = (astray & kept).sum()
    return {name: value.float() for name, value in sums.items()}


def token_shares(sums: dict[str, float]) -> dict[str, float]:
    """The logged shares and means, from the totals of `token_sums`."""
    forget, retain = max(sums["low"] + sums["high"], 1.0), sums["retain"]
    shares = {"tokens/low_entropy": sums["low"] / forget, "tokens/high_entropy": sums["high"] / forget}
    for name, total in sums.items():
        if "/" in name and ("forget" in name or retain):  # nothing is known of retained rows without a pass
            shares[name] = total / (forget if "forget" in name else retain)
    return shares
