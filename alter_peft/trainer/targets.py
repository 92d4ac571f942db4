# SPDX-License-Identifier: Apache-2.0
"""Where forget rows are to come to: the log-probabilities of text that the model never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
