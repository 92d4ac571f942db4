# SPDX-License-Identifier: Apache-2.0
"""Where forget rows are to come to, the log-probabilities of text that the model never saw, and where they began."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alter_peft.losses import ForgetLoss, TokenScores

from .token_targets import Guide, token_targets


GUESSED = (
    "Without calibration rows (`calibration_dataset`) forget rows come to "
    "{level}, a guess, and may be forgotten too little or too much. Rows like them that the model was "
    "never trained on measure the level."
)


class Measured(NamedTuple):
    """
    What a forget loss needs of the forget rows (`ForgetLoss.needs`); empty where it was not measured.

    Attributes:
        level: the answer probability of text never seen, or a guess at it.
        is_level_measured: whether rows that the model never saw have shown it.
        targets: the mean log-probability that each row is to come to, in nats, (rows,).
        profiles: the log-probabilities that each row's tokens are to come to, least likely first, (n_i,).
        reference: ln p of each row before the training, the sum over its labels, (rows,).
        token_targets: the log-probability that each token itself is to come to, (n_i,).
        token_leads: how far each is to lead its strongest rival, in nats, (n_i,).
        guide: what they were taken from, in words.
        other_labels, label_probabilities: labels for each token in place of its own, with their probabilities, or
            rivals, with their shares of what it gives up, (n_i, K).
        alternate_reference: `reference` of the rows with an alternate answer, (rows,).
        direction: where RMU sends activations, (k,).
    """

    level: float
    is_level_measured: bool = False
    targets: Tensor = torch.empty(0)
    profiles: Sequence[Tensor] = ()
    reference: Tensor = torch.empty(0)
    token_targets: Sequence[Tensor] = ()
    token_leads: Sequence[Tensor] = ()
    guide: str = ""
    other_labels: Sequence[Tensor] = ()
    label_probabilities: Sequence[Tensor] = ()
    alternate_reference: Tensor = torch.empty(0)
    direction: Tensor = torch.empty(0)

    @property
    def described_level(self) -> str:
        """The level, and whether it was measured."""
        return f"{self.level:.4g} ({'measured on `calibration_dataset`' if self.is_level_measured else 'a guess'})"


def measure(
    loss: ForgetLoss,
    known: Sequence[Tensor],
    unseen: Sequence[TokenScores],
    level: float,
    seed: int,
    guide: Guide | None = None,
) -> Measured:
    """
    What the forget loss needs, from log-probabilities before the training.

    Args:
        known: of each forget row's labels, (n_i,); may be none if the loss needs nothing.
        unseen: the scores of the labels of each row that the model was never trained on; may be none without profiles.
        level: in place of that of unseen rows.
        seed: draws an unseen row for each forget row.
        guide: for a loss with `token_targets`.
    """
    of_tokens, leads, source = list[Tensor](), list[Tensor](), ""
    targets, profiles, reference = torch.empty(0), list[Tensor](), torch.empty(0)
    of_unseen = [row.log_prob for row in unseen]
    if unseen:
        level = geometric_mean(of_unseen)
    if known:  # also for a loss that needs none: what was measured shows how far rows are from the level
        targets = level_targets(known, level)
    if "profiles" in loss.needs:
        profiles = unseen_profiles(known, of_unseen, seed)
        targets = torch.stack([profile.mean() for profile in profiles])
    if guide is not None and known:
        of_tokens, leads, level, source = token_targets(known, unseen, guide, level)
        targets = torch.stack([row.mean() for row in of_tokens])
    if "reference" in loss.needs:
        rows = torch.repeat_interleave(torch.arange(len(known)), torch.tensor([len(row) for row in known]))
        reference = torch.zeros(len(known)).index_add(0, rows, torch.cat(list(known)))
    found = Measured(level, bool(unseen), targets, profiles, reference, of_tokens, leads, source)
    if guide is None or not of_tokens or "rival_labels" not in loss.needs:
        return found
    rivals = [row.led(*aim) for row, *aim in zip(guide.rivals, of_tokens, leads, strict=True)]
    return found._replace(
        other_labels=[row.labels for row in rivals], label_probabilities=[row.shares for row in rivals]
    )


def geometric_mean(rows: Sequence[Tensor]) -> float:
    """exp of the mean over rows of a row's mean log-probability."""
    return math.exp(float(torch.stack([row.mean() for row in rows]).mean()))


def level_targets(known: Sequence[Tensor], level: float) -> Tensor:
    """
    The mean log-probability, in nats, that each row is to come to, (rows,).

    No row is raised above its own beginning: that would teach what the model never knew.

    Args:
        known: log-probabilities of each forget row's labels before the training, (n_i,).
        level: a probability.
    """
    return torch.stack([row.mean() for row in known]).clamp(max=math.log(level))


def unseen_profiles(known: Sequence[Tensor], unseen: Sequence[Tensor], seed: int) -> list[Tensor]:
    """
    The log-probabilities that each row's tokens are to come to, least likely first, (n_i,), in nats.

    Those of an unseen row, drawn for it by the seed (every one as often as any other, but for one time), read at as
    many ranks as the row has tokens. So the rows differ among each other as unseen ones do, and not only their tokens.
    No rank is raised above its own beginning.

    Args:
        known: log-probabilities of each forget row's labels before the training, (n_i,).
        unseen: the same of rows that the model was never trained on, one at least.
    """
    generator = np.random.default_rng(seed)
    rounds = [generator.permutation(len(unseen)) for _ in range(-(-len(known) // len(unseen)))]
    profiles = []
    for row, drawn in zip(known, np.concatenate(rounds), strict=False):
        like = unseen[drawn].sort().values.numpy()
        ranks, ranks_there = ((np.arange(size) + 0.5) / size for size in (len(row), len(like)))
        profile = torch.from_numpy(np.interp(ranks, ranks_there, like)).float()
        profiles.append(torch.minimum(profile, row.sort().values))
    return profiles
