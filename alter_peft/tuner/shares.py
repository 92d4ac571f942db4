# SPDX-License-Identifier: Apache-2.0
"""Which experts take part in a pass, and in which tokens: looked up once, for all layers.

The gates of a pass are known before its first adapted layer runs. Below the threshold a token has one expert (Eq. 9),
so of 1+N experts few have any. A layer need not multiply by the others, nor by any of an adapter whose tokens all
belong to a retain expert that is zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


MANY = 8  # experts from which looking at the gates is worth the synchronisation of an accelerator
FEW = 8  # experts that are multiplied at once, whoever has a token: at a rank of 8 cheaper than groups of tokens
TOKENS = 8  # for each expert, from which grouping tokens by expert is cheaper than multiplying at once


class Grouped(NamedTuple):
    """
    The tokens of a pass, grouped by expert.

    tokens: (E,), the index of each into the B T tokens; a token that two experts share is there twice.
    gates: (E, 1), the expert's share of it.
    parts: of each group in turn: the expert, how many tokens it has, whether it learns from them.
    places: (B T,), where in the groups each token is; `None` unless each is there once.
    """

    tokens: Tensor
    gates: Tensor
    parts: list[tuple[int, int, bool]]
    places: Tensor | None


class Shares(NamedTuple):
    """
    What the experts of one adapter do in one pass.

    gates: their shares of every token, the router's gates times the scales, (B, T, U).
    experts: the U experts that they are of; `None` for all 1+N.
    owner: (B, U), 1 where an expert learns from a row; `None` if all learn from all rows.
    whole: whether there is one expert, and it has all of every token.
    grouped: the tokens by expert, where it is cheaper so.
    """

    gates: Tensor
    experts: tuple[int, ...] | None = None
    owner: Tensor | None = None
    whole: bool = False
    grouped: Grouped | None = None


def may_look(gates: Collection[Tensor]) -> bool:
    """
    Whether the host may read these gates, of all adapters of a pass: not in a graph, and on an accelerator, which it
    then waits for, only where there are many experts.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if traced or any(own.is_meta for own in gates):
        return False
    if all(own.device.type == "cpu" for own in gates):
        return True
    return sum(own.shape[-1] for own in gates) > MANY and not torch.cuda.is_current_stream_capturing()


def look(gates: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """
    Of each adapter's gates (B, T, 1+N): the experts that any token has a share of, and those that have all of every
    token.
    """
    shapes: dict[tuple[torch.Size, torch.device], list[str]] = {}
    for name, own in gates.items():
        shapes.setdefault((own.shape, own.device), []).append(name)
    found = {}
    for names in shapes.values():
        least, most = torch.stack([gates[name] for name in names]).flatten(1, -2).aminmax(dim=1)
        for name, low, high in zip(names, least.tolist(), most.tolist(), strict=True):
            used = tuple(e for e, gate in enumerate(high) if gate != 0)
            found[name] = used, tuple(e for e in used if low[e] == 1)
    return found


def shares_of(
    gates: Tensor, scaled: Tensor, used: tuple[int, ...], whole: tuple[int, ...], owner: Tensor | None
) -> Shares:
    """
    What the experts `used` do.

    Args:
        gates: g, (B, T, 1+N).
        scaled: those times the scales.
        whole: the experts that have all of every token.
        owner: (B, 1+N), or `None`; an expert that has an owner's rows takes part, so that it has a gradient.
    """
    if owner is not None:
        used = tuple(sorted({*used, *owner.any(dim=0).nonzero().flatten().tolist()}))
    is_whole = len(used) == 1 and used == whole and scaled is gates
    if len(used) < gates.shape[-1]:
        index = torch.tensor(used, device=gates.device)
        gates, scaled = gates.index_select(-1, index), scaled.index_select(-1, index)
        owner = None if owner is None else owner.index_select(-1, index.to(owner.device))
    if owner is not None and len(used) == 1 and bool(owner.all()):
        owner = None
    grouped = None
    if len(used) > FEW and gates.device.type == "cpu" and gates.shape[:-1].numel() >= TOKENS * len(used):
        grouped = _grouped(gates, scaled, used, owner)
    return Shares(scaled, used, owner, is_whole and owner is None, grouped)


def _grouped(gates: Tensor, scaled: Tensor, used: tuple[int, ...], owner: Tensor | None) -> Grouped | None:
    """The tokens by expert; `None` if they have so many experts each that nothing is gained by it."""
    has = gates.flatten(0, -2) != 0  # (B T, U)
    if has.sum() > 2 * len(has):
        return None
    taught = [False] * len(used)
    if owner is None:
        groups = [(e, True) for e in range(len(used))]
    else:
        taught = owner.any(dim=0).tolist()
        learns = owner.bool().repeat_interleave(gates.shape[1], dim=0)
        has = torch.cat([has & learns, has & ~learns], dim=1)
        groups = [(e, learning) for learning in (True, False) for e in range(len(used))]
    group, tokens = has.T.nonzero(as_tuple=True)
    counts = has.sum(dim=0).tolist()
    # an expert that has an owner's rows takes part without a token too, so that it has a gradient
    parts = [
        (used[e], n, learns) for (e, learns), n in zip(groups, counts, strict=True) if n or (learns and taught[e])
    ]
    is_once = len(tokens) == len(has) and bool((has.sum(dim=1) == 1).all())
    share = scaled.flatten(0, -2)[tokens, group % len(used)]
    return Grouped(tokens, share.unsqueeze(-1), parts, tokens.argsort() if is_once else None)
