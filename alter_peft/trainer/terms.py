# SPDX-License-Identifier: Apache-2.0
"""Eq. 8: the forget and the retain term of a batch, as sums over its tokens or rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alter_peft.losses import ForgetBatch, ForgetLoss, Inside, RetainBatch, RetainLoss, TokenScores

from .batch import TokenMasks
from .inside import Base, Seen
from .targets import Measured


def forget_term(
    scores: TokenScores,
    batch: dict[str, Tensor],
    masks: TokenMasks,
    loss: ForgetLoss,
    options: dict[str, Any],
    measured: Measured,
    seen: Seen | None = None,
    base: Base | None = None,
    log_rivals: Tensor | None = None,
) -> Tensor:
    """
    The sum of a forget loss over what it is of, with the weight that its entry gives it.

    Args:
        seen, base: for a loss of what is inside the model that is trained, or its base.
        log_rivals: ln p of what `rivals_in` finds, of the batch's labelled tokens, (n, K).
    """
    given = forget_batch(scores, batch, masks, loss, measured)
    if log_rivals is not None:
        given = given._replace(log_rivals=log_rivals[masks.given(loss)[masks.labelled]])
    if seen is not None and base is not None:
        given = given._replace(inside=_inside(seen, batch, masks.given(loss), loss, measured, base))
    return loss.weight * loss.compute(given, options).sum()


def rivals_in(batch: dict[str, Tensor], masks: TokenMasks, loss: ForgetLoss, measured: Measured) -> Tensor:
    """
    The rivals of the batch's labelled tokens, (n, K): 0 of those that the forget loss is not given, K = 0 without any.
    """
    given, rows = masks.given(loss), masks.forget.any(dim=1)
    found = [measured.other_labels[i] for i in batch["row_id"][rows].tolist()] if "rival_labels" in loss.needs else []
    rivals = given.new_zeros(int(masks.labelled.sum()), found[0].shape[1] if found else 0, dtype=torch.long)
    if found:
        rivals[given[masks.labelled]] = torch.cat(found).to(rivals)
    return rivals


def retain_term(
    scores: TokenScores,
    seen: Seen,
    batch: dict[str, Tensor],
    masks: TokenMasks,
    loss: RetainLoss,
    base: Base,
) -> Tensor:
    """
    The sum of a retain loss over the labelled tokens of the retain rows.

    Args:
        scores: of the batch's labelled tokens.
        seen: by the model that is trained.
        base: looks at the rows as well if the loss needs it.
    """
    kept = masks.kept
    of_kept = TokenScores(*(part[kept[masks.labelled]] for part in scores))
    own = seen.at(kept)
    given = RetainBatch(of_kept, own.hidden, None, base.scored.head, base.head, own.activations)
    if loss.needs_base:
        of_base = _of_base(base, batch, kept)
        given = given._replace(base_hidden=of_base.hidden, base_activations=of_base.activations)
    return loss.compute(given).sum()


def _of_base(base: Base, batch: dict[str, Tensor], chosen: Tensor) -> Seen:
    """What the base model has at the chosen tokens, bool (B, T-1)."""
    rows = chosen.any(dim=1)
    return base.see(batch["input_ids"][rows], batch["attention_mask"][rows]).at(chosen[rows])


def _inside(
    seen: Seen, batch: dict[str, Tensor], given: Tensor, loss: ForgetLoss, measured: Measured, base: Base
) -> Inside:
    """What is inside at the tokens that a forget loss is given, bool (B, T-1)."""
    own, labels = seen.at(given), batch["labels"][:, 1:][given]
    base_hidden = _of_base(base, batch, given).hidden if "base" in loss.needs else None
    direction = measured.direction.to(given.device) if len(measured.direction) else None
    return Inside(own.hidden, base.scored.head, labels, base_hidden, base.head, own.activations, direction)


def forget_batch(
    scores: TokenScores, batch: dict[str, Tensor], masks: TokenMasks, loss: ForgetLoss, measured: Measured
) -> ForgetBatch:
    """
    What a forget loss is given of a batch: its rows that have a token that the loss is of.

    Args:
        scores: of the batch's labelled tokens.
        measured: of the forget rows of the data set.
    """
    targets, profiles, reference = measured.targets, measured.profiles, measured.reference
    given = masks.given(loss)
    rows, places = _numbered(given)
    ids = batch["row_id"][places]
    empty = scores.log_prob.new_empty(0)

    def of_tokens(values: Any) -> Tensor:
        return torch.cat([values[i] for i in ids.tolist()]).to(ids.device) if len(values) and len(ids) else empty

    found = ForgetBatch(
        TokenScores(*(part[given[masks.labelled]] for part in scores)),
        rows,
        len(places),
        targets.to(ids.device)[ids] if "targets" in loss.needs else empty,
        of_tokens(profiles),
        reference.to(ids.device)[ids] if len(reference) else empty,
        token_targets=of_tokens(measured.token_targets),
        token_leads=of_tokens(measured.token_leads) if measured.token_leads else None,
        other_labels=of_tokens(measured.other_labels),
        label_probabilities=of_tokens(measured.label_probabilities),
    )
    if "alternate" not in batch:
        return found
    others, reference = masks.others, measured.alternate_reference
    rows, places = _numbered(others)
    ids = batch["row_id"][places]
    of_others = TokenScores(*(part[others[masks.labelled]] for part in scores))
    reference = reference.to(ids.device)[ids] if len(reference) else empty
    return found._replace(alternates=ForgetBatch(of_others, rows, len(places), empty, empty, reference))


def _numbered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of the chosen tokens, bool (B, T-1): the number, from 0, of each one's row among those that have any; these."""
    places = chosen.any(dim=1).nonzero().flatten()
    numbers = torch.full((len(chosen),), -1, device=chosen.device)
    numbers[places] = torch.arange(len(places), device=chosen.device)
    return numbers.unsqueeze(1).expand_as(chosen)[chosen], places
