# SPDX-License-Identifier: Apache-2.0
"""A and the experts B of one layer, and the sum over the gated experts (Eqs. 2, 6, 9)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shares import Grouped, Shares


class SharedProjection(nn.Linear):
    """A of Eq. 2: (r, k), shared by all experts of a layer. `learn=False` lets no gradient reach A."""

    def __init__(self, in_features: int, r: int) -> None:
        super().__init__(in_features, r, bias=False)

    def forward(self, input: Tensor, learn: bool = True) -> Tensor:
        return F.linear(input, self.weight if learn else self.weight.detach())


class ExpertBank(nn.Module):
    """B_r and B_f^1..B_f^N of one layer: separate Parameters (d, r), so that an optimiser step on one moves no other.

    The experts are read in this module's own `forward` alone, where ZeRO-3 and FSDP have gathered them.
    """

    def __init__(self, out_features: int, r: int, num_forget_experts: int) -> None:
        super().__init__()
        self.num_forget_experts = num_forget_experts
        for name in self.names():
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, r)))

    def names(self) -> list[str]:
        """Names of the Parameters, the retain expert first, then the forget experts in the order of the domains."""
        return ["retain", *(f"forget_{d}" for d in range(self.num_forget_experts))]

    def expert(self, e: int) -> nn.Parameter:
        """B_r for 0, B_f^e for the others."""
        expert: nn.Parameter = getattr(self, "retain" if e == 0 else f"forget_{e - 1}")
        return expert

    def experts(self) -> list[nn.Parameter]:
        """B_r, B_f^1, ..., B_f^N; inside of FSDP 1 they are views of its flat parameter."""
        return [getattr(self, name) for name in self.names()]

    def forward(self, h: Tensor, shares: Shares, learn: bool = True) -> Tensor:
        """
        sum_e g_e B_e h (Eq. 9), of the experts that take part alone, and never in a loop over all of them.

        Args:
            h: A x, (..., r).
            shares: g, whose it is, and who learns from which row.
            learn: whether gradients reach the experts at all.
        """
        experts = self.experts() if shares.experts is None else [self.expert(e) for e in shares.experts]
        owner = shares.owner if learn else None
        if owner is not None and owner.shape[0] != h.shape[0]:
            raise ValueError(
                f"A layer was given an input of shape {tuple(h.shape[:-1])} before its last dimension, in which the "
                f"{owner.shape[0]} rows of the batch cannot be told apart. Exclude this layer by `exclude_modules`."
            )
        if len(experts) == 1 and owner is None:
            return F.linear(h if shares.whole else h * shares.gates.to(h), _learning(experts[0], learn))
        if shares.grouped is not None:
            return self._by_group(h, shares.grouped, learn)
        stacked = _learning(torch.cat(tuple(experts), dim=1), learn)  # (d, U r)
        gated = shares.gates.to(h).unsqueeze(-1) * h.unsqueeze(-2)  # (..., U, r)
        if owner is None:
            return F.linear(gated.flatten(-2), stacked)
        owned = owner.to(gated).view(owner.shape[0], *[1] * (gated.dim() - 3), owner.shape[1], 1).expand_as(gated)
        if torch.compiler.is_compiling():  # Dynamo warns of a function with a backward of its own
            taught = gated * owned
            both = torch.cat([taught.flatten(-2), (gated - taught).flatten(-2)], dim=-1)  # (..., 2 U r)
            return F.linear(both, torch.cat([stacked, stacked.detach()], dim=1))
        added: Tensor = _Isolated.apply(gated.flatten(-2), stacked.to(gated.dtype), owned.flatten(-2))
        return added

    def _by_group(self, h: Tensor, grouped: Grouped, learn: bool) -> Tensor:
        """As `forward`, each expert on its own tokens."""
        counts = [count for _, count, _ in grouped.parts]
        tokens = grouped.tokens.to(h.device)  # the layer may be on another device than the router
        own = (h.flatten(0, -2).index_select(0, tokens) * grouped.gates.to(h)).split(counts)
        found = torch.cat(
            [
                F.linear(part, _learning(self.expert(e), learn and learns))
                for part, (e, _, learns) in zip(own, grouped.parts, strict=True)
            ]
        )
        if grouped.places is not None:
            found = found.index_select(0, grouped.places.to(h.device))
        else:
            found = found.new_zeros(h.shape[:-1].numel(), found.shape[-1]).index_add_(0, tokens, found)
        added: Tensor = found.unflatten(0, h.shape[:-1])
        return added

    def delete(self, d: int) -> None:
        """Remove B_f^(d+1); the forget experts behind it move up by one."""
        for later in range(d + 1, self.num_forget_experts):
            self.register_parameter(f"forget_{later - 1}", self.get_parameter(f"forget_{later}"))
        self.num_forget_experts -= 1
        delattr(self, f"forget_{self.num_forget_experts}")


class _Isolated(torch.autograd.Function):
    """`F.linear`, whose weight learns from what is owned alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, owned: Tensor) -> Tensor:
        """
        Args:
            input: (..., U r).
            weight: (d, U r).
            owned: 1 where a column of the weight learns from an entry of the input, (..., U r).
        """
        ctx.save_for_backward(input, weight, owned)
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weight, owned = ctx.saved_tensors
        taught = (input * owned).flatten(0, -2)
        return grad @ weight, grad.flatten(0, -2).T @ taught, None


def _learning(expert: Tensor, learn: bool) -> Tensor:
    return expert if learn else expert.detach()


def scale_gates(gates: Tensor, saved: tuple[float, ...], temporary: Tensor | None) -> Tensor:
    """
    What an expert's share of a token is multiplied by, after the router's choice.

    Args:
        gates: g, (B, T, 1+N) or (..., 1+N).
        saved: the scale of every expert, the retain expert first.
        temporary: scales in their place, (1+N,) or one row for each of the batch, (B, 1+N); `None` without any.

    Raises:
        ValueError: rows of scales for a batch of another size.
    """
    if temporary is None:
        return gates if set(saved) == {1.0} else gates * gates.new_tensor(saved)
    scales = temporary.to(gates)
    if scales.dim() == 2:
        check_rows(scales, gates.shape[0])
        scales = scales.view(len(scales), *[1] * (gates.dim() - 2), -1)
    return gates * scales


def check_rows(scales: Tensor, batch: int) -> None:
    """Raise a `ValueError` if scales of single rows are given for a batch of another size."""
    if len(scales) != batch:
        raise ValueError(
            f"`experts` was given scales for {len(scales)} rows, but the batch has {batch}. Give one number for all "
            "rows, or one for each; beams and `num_return_sequences` are rows of their own, so repeat each row's "
            "scale for them (`repeat_interleave(num_beams)`)."
        )
