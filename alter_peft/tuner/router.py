# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import AlterConfig


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


def gate(logits: Tensor, high: Tensor | None, temperature_high: float, temperature_low: float, top_k: int) -> Tensor:
    """
    Eq. 7: softmax(z / tau(S)), with tau = `temperature_high` on high-entropy tokens, which keep the retain expert and
    their `top_k` best forget experts (renormalised), and `temperature_low`, nearly one-hot, on the others.

    Args:
        logits: z, (..., 1+N), retain expert first.
        high: bool (...), S > threshold; `None` if no token counts as high.

    Returns:
        gates g, (..., 1+N), each row summing to 1.
    """
    low_gates = (logits / temperature_low).softmax(dim=-1)
    if high is None:
        return low_gates
    probabilities = (logits / temperature_high).softmax(dim=-1)
    forget = probabilities[..., 1:]
    best = forget.topk(min(top_k, forget.shape[-1]), dim=-1).indices
    keep = torch.zeros_like(probabilities).scatter(-1, best + 1, 1.0)
    keep[..., 0] = 1.0
    kept = probabilities * keep
    return torch.where(high.unsqueeze(-1), kept / kept.sum(dim=-1, keepdim=True), low_gates)


class AlterTunerLayer(BaseTunerLayer):
    """What every part of an adapter inside the base model is: PEFT switches, freezes and deletes them all alike."""


class AlterRouter(nn.Module, AlterTunerLayer):
    """
    The router of each adapter (Eq. 7), a child of decoder layer l0, whose input it reads.

    z_t = W [c_t ; S_t - threshold] + b for the context router; z_t = W S_t, the letter of Eq. 7, for the entropy
    router. An unknown S counts as one at the threshold. Always float32; fitted in phase I and frozen.
    """

    # no `adapter_layer_names`: PEFT makes what is listed there trainable, and its status would call a model whose
    # experts train while its router is frozen "irregular"
    other_param_names: tuple[str, ...] = ("alter_router", "config")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.alter_router: Any = nn.ModuleDict({})  # of nn.Linear
        self.config: dict[str, AlterConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._layer = (layer,)  # in a tuple, so that the parent is no child of its own child

    def update_layer(self, adapter_name: str, width: int, config: AlterConfig) -> None:
        """Create the router of an adapter; its outputs start at zero."""
        outputs = 1 + (config.num_forget_experts or 1)
        context = config.router == "context"
        linear = nn.Linear(width + 1 if context else 1, outputs, bias=context)
        if not config.init_weights:
            nn.init.normal_(linear.weight, std=4.0)  # for tests: gates that really differ from token to token
        else:
            nn.init.zeros_(linear.weight)
        if context:
            nn.init.zeros_(linear.bias)
        self.alter_router[adapter_name] = linear.requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.config[adapter_name] = config

    def logits(self, name: str, context: Context, entropy: Tensor | None) -> Tensor:
        """z, (B, T, 1+N), from the moving average and S_q (B, T), or `None` where it isn't known."""
        config, linear = self.config[name], self.alter_router[name]
        with torch.autocast(linear.weight.device.type, enabled=False):
            if config.router == "entropy":
                if entropy is None:
                    raise ValueError("`router='entropy'` needs S_q; set `inference_entropy='base'`.")
                features = entropy.float().unsqueeze(-1)
            else:
                surprise = torch.zeros_like(context.weight) if entropy is None else self._above(name, entropy)
                features = torch.cat([context.average(), surprise.unsqueeze(-1)], dim=-1)
            bias = None if linear.bias is None else linear.bias.float()
            return F.linear(features, linear.weight.float(), bias)

    def forward(self, name: str, context: Context, entropy: Tensor | None) -> Tensor:
        """Gates of every position, (B, T, 1+N), float32."""
        config = self.config[name]
        high = None if entropy is None else self._above(name, entropy) > 0
        logits = self.logits(name, context, entropy)
        return gate(logits, high, config.temperature_high, config.temperature_low, config.top_k)

    def _above(self, name: str, entropy: Tensor) -> Tensor:
        threshold = self.config[name].entropy_threshold
        if threshold is None:
            raise ValueError(
                "`entropy_threshold` is not known yet: with `entropy_quantile` it is measured by the trainer. "
                "Train the adapter first or set `entropy_threshold`."
            )
        return entropy.float() - threshold

    def hold_as_buffers(self) -> None:
        """Make buffers of all weights, for DeepSpeed, which rounds and splits Parameters, frozen ones too."""
        for linear in self.alter_router.values():
            for name, parameter in list(linear.named_parameters()):
                delattr(linear, name)
                linear.register_buffer(name, parameter.detach())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge: a gated adapter is refused before this is reached."""

    def unmerge(self) -> None:
        """Nothing to unmerge."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlterRouter:
        """Moves to a device, never to another dtype: `model.half()` would round the gates."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)
        return self

    def get_base_layer(self) -> nn.Module:
        """The decoder layer whose input is read."""
        return self._layer[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return next(base_layer.parameters()).device, torch.float32
