# SPDX-License-Identifier: Apache-2.0
"""c_t, what the context router reads: a moving average of the residual stream over a token's own prefix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


CHUNK = 128  # positions a chunk of the moving average, which holds CHUNK weights a position


class Context(NamedTuple):
    """The moving average at each position: `sum / weight` is c_t, `count` the tokens seen so far.

    sum: (B, T, k); weight, count: (B, T), all float32.
    """

    sum: Tensor
    weight: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    def average(self) -> Tensor:
        """c_t, (B, T, k); zero where no token but the first was seen."""
        return self.sum / self.weight.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)


def moving_average(hidden: Tensor, valid: Tensor, half_life: float, past: Context | None = None) -> Context:
    """
    Exponential moving average of the unit-normalised residual stream over the valid positions 1..t.

    Each position depends on its own row's prefix alone; padding is passed over, on either side, and position 0 (the
    attention sink) is left out.

    Args:
        hidden: residual stream, (B, T, k).
        valid: bool (B, T), False at padding.
        half_life: in tokens.
        past: the last position of what came before, T = 1; `None` at the start of a text.
    """
    batch, length, width = hidden.shape
    states = F.normalize(hidden.float(), dim=-1)
    zero = states.new_zeros
    total, weight, count = past or Context(zero(batch, 1, width), zero(batch, 1), zero(batch, 1))
    counts = count + valid.cumsum(dim=1)
    used = (valid & (counts > 1)).to(states.dtype)
    decay = 0.5 ** (1.0 / half_life)
    # chunks of positions, and no loop over them: a compiled graph then serves every length
    size = min(length, CHUNK)
    padding = -length % size
    states = F.pad(states, (0, 0, 0, padding)).unflatten(1, (-1, size))  # (B, m, size, k)
    used = F.pad(used, (0, padding)).unflatten(1, (-1, size))
    n = torch.cat([counts, counts[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, size))
    age = (n.unsqueeze(3) - n.unsqueeze(2)).clamp(min=0)  # (B, m, t, s)
    share = (decay**age * used.unsqueeze(2)).tril()
    sums, weights = share @ states, share.sum(dim=-1)

    ends = n[..., -1]
    starts = torch.cat([count, ends[:, :-1]], dim=1)
    carry = (decay ** (starts.unsqueeze(2) - ends.unsqueeze(1)).clamp(min=0)).tril(-1)  # (B, m, m)
    kept = decay ** (starts - count)
    total = carry @ sums[:, :, -1] + kept.unsqueeze(-1) * total  # what each chunk begins with, (B, m, k)
    weight = (carry @ weights[:, :, -1:]).squeeze(-1) + kept * weight
    carried = decay ** (n - starts.unsqueeze(-1))
    sums = sums + carried.unsqueeze(-1) * total.unsqueeze(2)
    weights = weights + carried * weight.unsqueeze(-1)
    return Context(sums.flatten(1, 2)[:, :length], weights.flatten(1, 2)[:, :length], counts)
