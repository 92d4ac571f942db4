# SPDX-License-Identifier: Apache-2.0
"""Eq. 8: the forget and the retain term of a batch, as sums over its tokens or rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alter_peft.losses import ForgetBatch, ForgetLoss, RetainBatch, RetainLoss, TokenScores
from alter_peft.scoring import ScoredModel

from .batch import TokenMasks
from .targets import Measured


def forget_term(
    scores: TokenScores,
    batch: dict[str, Tensor],
    masks: TokenMasks,
    loss: ForgetLoss,
    options: dict[str, float],
    measured: Measured,
) -> Tensor:
    """The sum of a forget loss over what it is of, with the weight that its entry gives it."""
    return loss.weight * loss.compute(forget_batch(scores, batch, masks, loss, measured), options).sum()


def retain_term(
    scores: TokenScores,
    hidden: Tensor,
    batch: dict[str, Tensor],
    masks: TokenMasks,
    loss: RetainLoss,
    scored: ScoredModel,
) -> Tensor:
    """
    The sum of a retain loss over the labelled tokens of the retain rows.

    Args:
        scores: of the batch's labelled tokens.
        hidden: the model's last hidden states but for the last position, (B, T-1, k).
        scored: the model; its base looks at the rows as well if the loss needs it.
    """
    kept, base = masks.kept, None
    if loss.needs_base:
        rows = batch["expert"] == 0
        with scored.as_base():
            states = scored.base_hidden_states(batch["input_ids"][rows], batch["attention_mask"][rows])
        base = states[:, :-1][kept[rows]]
    of_kept = TokenScores(*(part[kept[masks.labelled]] for part in scores))
    return loss.compute(RetainBatch(of_kept, hidden[kept], base, scored.head)).sum()


def forget_batch(
    scores: TokenScores, batch: dict[str, Tensor], masks: TokenMasks, loss: ForgetLoss, measured: Measured
) -> ForgetBatch:
    """
    What a forget loss is given of a batch: its rows that have a token that the loss is of.

    Args:
        scores: of the batch's labelled tokens.
        measured: of the forget rows of the data set.
    """
    targets, reference = measured.targets, measured.reference
    aimed = masks.aimed(loss)
    own = aimed[masks.labelled]
    places = aimed.any(dim=1).nonzero().flatten()
    numbers = torch.full((len(aimed),), -1, device=aimed.device)
    numbers[places] = torch.arange(len(places), device=aimed.device)
    rows = numbers.unsqueeze(1).expand_as(aimed)[aimed]
    ids = batch["row_id"][places]
    empty = scores.log_prob.new_empty(0)

    def of_rows(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([values[i] for i in ids.tolist()]).to(ids.device) if len(values) and len(ids) else empty

    return ForgetBatch(
        TokenScores(*(part[own] for part in scores)),
        rows,
        len(places),
        targets.to(ids.device)[ids] if "targets" in loss.needs else empty,
        of_rows(measured.profiles),
        reference.to(ids.device)[ids] if len(reference) else empty,
        of_rows(measured.token_targets),
    )
