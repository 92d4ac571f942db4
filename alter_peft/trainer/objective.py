# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alter_peft.entropy import entropy_masks
from alter_peft.losses import (
    TokenScores,
    cross_entropy_loss,
    inverted_hinge_loss,
    kl_to_base_loss,
    level_loss,
    profile_loss,
)
from alter_peft.tuner.base_pass import base_model
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.decoder import LanguageModelHead
from alter_peft.tuner.gating import GatingContext

from .config import AlterUnlearnConfig


class TokenMasks(NamedTuple):
    """Kinds of tokens in a batch, each bool (B, T-1); position t is for the label at t + 1."""

    labelled: Tensor
    forget: Tensor
    low: Tensor
    high: Tensor


class Objective:
    """
    The forget and the retain term of Eq. 8 on the scores of a batch, and how many tokens each is a mean of.

    The third term is [`StructuralTerm`].

    Args:
        args: the forms of the terms.
        config: for the entropy threshold and the number of experts.
        decoder, head, context: the base model, for the KL form of the retain term.
    """

    def __init__(
        self,
        args: AlterUnlearnConfig,
        config: AlterConfig,
        decoder: nn.Module,
        head: LanguageModelHead,
        context: GatingContext,
    ) -> None:
        self.args, self.config = args, config
        self.decoder, self.head, self.context = decoder, head, context
        # log-probability in nats that each forget row is to come to, (rows,); phase I measures it
        self.targets = torch.empty(0)
        # and for the profile loss those of its tokens, least likely first, (tokens,) for each row
        self.profiles: list[Tensor] = []

    @property
    def num_experts(self) -> int:
        """1 + N."""
        return 1 + (self.config.num_forget_experts or 1)

    def masks(self, batch: dict[str, Tensor]) -> TokenMasks:
        """Labelled tokens, those of forget rows, and which of these have low and high entropy."""
        labelled = batch["labels"][:, 1:] != -100
        forget = (batch["expert"] > 0).unsqueeze(1).expand_as(labelled)
        threshold = self.config.entropy_threshold
        assert threshold is not None
        return TokenMasks(labelled, forget, *entropy_masks(batch["entropy"][:, :-1], labelled, threshold))

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """Tokens of the forget, retain and structural terms, and rows that each expert learns from, (3+1+N,)."""
        masks = self.masks(batch)
        aimed, kept = self._aimed(masks), masks.labelled & ~masks.forget
        learns = aimed.any(dim=1) & (self.args.forget_weight > 0) | kept.any(dim=1) & (self.args.retain_weight > 0)
        rows = torch.bincount(batch["expert"][learns], minlength=self.num_experts)
        return torch.cat([torch.stack([aimed.sum(), kept.sum(), masks.high.sum()]), rows]).float()

    def forget(self, scores: TokenScores, batch: dict[str, Tensor], masks: TokenMasks) -> Tensor:
        """Summed: a hinge over low-entropy tokens, or what whole answers are to come to, as it was measured."""
        aimed = self._aimed(masks)[masks.labelled]
        aimed_scores = TokenScores(*(part[aimed] for part in scores))
        if not self.args.lands:
            margin = None if self.args.forget_loss == "paper" else self.args.margin
            return inverted_hinge_loss(aimed_scores, margin).sum()
        rows = torch.arange(len(masks.labelled), device=aimed.device).unsqueeze(1).expand_as(masks.labelled)
        rows = rows[masks.labelled][aimed]
        if self.args.forget_loss == "profile":
            profiles = [self.profiles[i] for i in batch["row_id"][batch["expert"] > 0].tolist()]
            return profile_loss(aimed_scores, rows, torch.cat(profiles).to(aimed.device)).sum()
        targets = self.targets.to(aimed.device)[batch["row_id"].clamp(max=len(self.targets) - 1)]
        return level_loss(aimed_scores, rows, targets).sum()

    def retain(self, scores: TokenScores, hidden: Tensor, batch: dict[str, Any], masks: TokenMasks) -> Tensor:
        """Summed over the labelled tokens of the retain rows; `hidden` is (B, T-1, k)."""
        if self.args.retain_loss == "cross_entropy":
            return cross_entropy_loss(scores)[~masks.forget[masks.labelled]].sum()
        kept = masks.labelled & ~masks.forget
        rows = batch["expert"] == 0
        with base_model(self.decoder, self.head, self.context):
            ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
            base = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0][:, :-1]
        return kl_to_base_loss(hidden[kept], base[kept[rows]], self.head).sum()

    def _aimed(self, masks: TokenMasks) -> Tensor:
        return (masks.labelled if self.args.lands else masks.low) & masks.forget


@torch.no_grad()
def token_sums(scores: TokenScores, masks: TokenMasks, experts: Tensor, gates: Tensor | None) -> dict[str, Tensor]:
    """
    What is logged of a batch, as sums over its answer tokens, so that batches and processes add up.

    Args:
        experts: (B,), the expert that each row belongs to.
        gates: (B, T, 1+N), or `None` under the static router.
    """
    labelled, forget, low, high = masks
    p = scores.log_prob.exp()
    sums = {
        "low": (low & forget).sum(),
        "high": (high & forget).sum(),
        "retain": (labelled & ~forget).sum(),
        "probability/forget": p[forget[labelled]].sum(),
        "probability/retain": p[~forget[labelled]].sum(),
    }
    if gates is not None:
        astray = labelled & (gates[:, :-1].argmax(dim=-1) != experts.unsqueeze(1))
        sums["router/forget_astray"] = (astray & forget).sum()
        sums["router/retain_astray"] = (astray & ~forget).sum()
    return {name: value.float() for name, value in sums.items()}


def token_shares(sums: dict[str, float]) -> dict[str, float]:
    """The logged shares and means, from the totals of `token_sums`."""
    forget, retain = max(sums["low"] + sums["high"], 1.0), max(sums["retain"], 1.0)
    shares = {"tokens/low_entropy": sums["low"] / forget, "tokens/high_entropy": sums["high"] / forget}
    for name, total in sums.items():
        if "/" in name:
            shares[name] = total / (forget if "forget" in name else retain)
    return shares
