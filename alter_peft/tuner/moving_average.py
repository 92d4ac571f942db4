# SPDX-License-Identifier: Apache-2.0
"""c_t, what the context router reads: a moving average of the residual stream over a token's own prefix."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast


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


def moving_average(
    hidden: Tensor, valid: Tensor, half_life: float, past: Context | None = None, text: Tensor | None = None
) -> Context:
    """
    Exponential moving average of the unit-normalised residual stream over the valid positions 1..t of a text.

    Each position depends on its own text's prefix alone; padding is passed over, on either side, and position 0 (the
    attention sink) is left out. Always in float32, under autocast too.

    Args:
        hidden: residual stream, (B, T, k).
        valid: bool (B, T), False at padding.
        half_life: in tokens.
        past: the last position of what came before, T = 1, which the first text here goes on from; `None` at the
            start of a text.
        text: the number of the text in its row that each position belongs to, ascending, (B, T); `None` if a row is
            one text.
    """
    with maybe_autocast(hidden.device.type, enabled=False):
        return _moving_average(hidden.float(), valid, 0.5 ** (1.0 / half_life), past, text)


def _moving_average(hidden: Tensor, valid: Tensor, decay: float, past: Context | None, text: Tensor | None) -> Context:
    batch, length, width = hidden.shape
    states = F.normalize(hidden, dim=-1)
    zero = states.new_zeros
    total, weight, count = past or Context(zero(batch, 1, width), zero(batch, 1), zero(batch, 1))
    if length == 1:  # decoding: a row of one token goes on with the text that it has
        seen = count + valid.to(count.dtype)
        used = (valid & (seen > 1)).to(states.dtype)
        kept = decay ** (seen - count)
        return Context(kept.unsqueeze(-1) * total + used.unsqueeze(-1) * states, kept * weight + used, seen)
    seen = count + valid.cumsum(dim=1)  # of the whole row
    counts = seen if text is None else seen - _before(text, seen - valid.to(seen.dtype))
    used = (valid & (counts > 1)).to(states.dtype)
    # chunks of positions, and no loop over them: a compiled graph then serves every length
    size = min(length, CHUNK)
    padding = -length % size
    states = F.pad(states, (0, 0, 0, padding)).unflatten(1, (-1, size))  # (B, m, size, k)
    used = F.pad(used, (0, padding)).unflatten(1, (-1, size))
    # where a position is: tokens seen so far, and the text
    places = [_in_chunks(part, padding, size) for part in ([seen] if text is None else [seen, text])]
    ends = [part[..., -1] for part in places]
    firsts = [count] if text is None else [count, text[:, :1]]
    starts = [torch.cat([first, end[:, :-1]], dim=1) for first, end in zip(firsts, ends, strict=True)]

    def left(later: list[Tensor], earlier: list[Tensor]) -> Tensor:
        """What is left of an earlier position's weight at a later one; nothing in another text."""
        share: Tensor = decay ** (later[0] - earlier[0]).clamp(min=0)
        return share if text is None else share * later[1].eq(earlier[1])

    share = (left(_each(places, 3), _each(places, 2)) * used.unsqueeze(2)).tril()  # (B, m, t, s)
    sums, weights = share @ states, share.sum(dim=-1)
    carry = left(_each(starts, 2), _each(ends, 1)).tril(-1)  # (B, m, m)
    kept = left(starts, firsts)
    total = carry @ sums[:, :, -1] + kept.unsqueeze(-1) * total  # what each chunk begins with, (B, m, k)
    weight = (carry @ weights[:, :, -1:]).squeeze(-1) + kept * weight
    carried = left(places, _each(starts, -1))
    sums = sums + carried.unsqueeze(-1) * total.unsqueeze(2)
    weights = weights + carried * weight.unsqueeze(-1)
    return Context(sums.flatten(1, 2)[:, :length], weights.flatten(1, 2)[:, :length], counts)


def _before(text: Tensor, earlier: Tensor) -> Tensor:
    """Of `earlier` (B, T), what a row had seen before each position: its value where that position's text began."""
    begins = text.diff(dim=-1, prepend=text[:, :1]) != 0
    before: Tensor = torch.where(begins, earlier, 0.0).cummax(dim=1)[0]
    return before


def _in_chunks(values: Tensor, padding: int, size: int) -> Tensor:
    """(B, T) -> (B, m, size), the last position repeated."""
    chunks: Tensor = torch.cat([values, values[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, size))
    return chunks


def _each(parts: list[Tensor], dim: int) -> list[Tensor]:
    return [part.unsqueeze(dim) for part in parts]
