# SPDX-License-Identifier: Apache-2.0
"""Routers as a part of the model: weights of each adapter's, on the decoder layer whose input they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .config import AlterConfig
from .moving_average import Context
from .router import above_threshold, gate, logits_of


class AlterTunerLayer(BaseTunerLayer):
    """What every part of an adapter inside the base model is: PEFT switches, freezes and deletes them all alike."""


class RouterMap(nn.Linear):
    """
    What makes z_t of x_t (`logits_of`): W and b under the names of a linear layer, and before them, if there is one,
    the hidden layer's.

    Args:
        features: entries of x_t.
        hidden: units of the hidden layer; 0 for none.
        outputs: entries of z_t.
        bias: whether there is a b.
    """

    def __init__(self, features: int, hidden: int, outputs: int, bias: bool) -> None:
        super().__init__(hidden or features, outputs, bias)
        self.has_hidden_layer = hidden > 0
        if hidden:
            self.hidden_weight = nn.Parameter(torch.zeros(hidden, features))
            self.hidden_bias = nn.Parameter(torch.zeros(hidden))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        found: dict[str, Tensor] = {"weight": self.weight}
        if self.bias is not None:
            found["bias"] = self.bias
        if self.has_hidden_layer:
            found |= {"hidden_weight": self.hidden_weight, "hidden_bias": self.hidden_bias}
        return found

    def forward(self, input: Tensor) -> Tensor:
        return logits_of(input, self.weights)


class AlterRouter(nn.Module, AlterTunerLayer):
    """
    The router of each adapter (Eq. 7), a child of the decoder layer whose input it reads.

    z_t is `logits_of` the x_t of its entry in `ROUTERS`. Always float32; fitted in phase I and frozen.
    """

    # no `adapter_layer_names`: PEFT makes what is listed there trainable, and its status would call a model whose
    # experts train while its router is frozen "irregular"
    other_param_names: tuple[str, ...] = ("alter_router", "config")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.alter_router: Any = nn.ModuleDict({})  # of RouterMap
        self.config: dict[str, AlterConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._layer = (layer,)  # in a tuple, so that the parent is no child of its own child

    def update_layer(self, adapter_name: str, width: int, config: AlterConfig) -> None:
        """Create the router of an adapter; its outputs start at zero."""
        router = config.routing
        outputs = router.num_outputs(config.num_forget_experts or 1)
        hidden = config.router_hidden_size or 0
        made = RouterMap(router.num_features(width), hidden, outputs, router.has_bias)
        # random ones are for tests: gates that really differ from token to token, by as much with a hidden layer
        spread = {"weight": 4.0 / (hidden or 1) ** 0.5, "hidden_weight": 2**0.5}
        for name, weight in made.named_parameters():
            if config.init_weights:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=spread.get(name, 0.0))
        self.alter_router[adapter_name] = made.requires_grad_(False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.config[adapter_name] = config

    def logits(
        self, name: str, context: Context, entropy: Tensor | None, features: dict[Any, Tensor] | None = None
    ) -> Tensor:
        """
        z, (B, T, 1+N or N), from the moving average and S_q (B, T), or `None` where it isn't known.

        Args:
            features: x_t of other adapters in this pass, to be used again: with one half-life they have one average.
        """
        config, made = self.config[name], self.alter_router[name]
        threshold = None if entropy is None else config.entropy_threshold
        known = {} if features is None else features
        key = config.router, config.router_half_life, threshold
        with maybe_autocast(made.weight.device.type, enabled=False):
            if key not in known:
                known[key] = config.routing.features(context.average(), entropy, config.entropy_threshold)
            logits: Tensor = made(known[key])
            return logits

    def forward(self, name: str, context: Context, entropy: Tensor | None) -> Tensor:
        """Gates of every position, (B, T, 1+N), float32."""
        return self.gates({name: context}, {name: entropy})[name]

    def gates(self, contexts: dict[str, Context], entropies: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """As `forward`, of several adapters: those whose softmax is the same share it."""
        alike: dict[Any, list[str]] = {}
        features: dict[Any, Tensor] = {}
        logits, highs = {}, {}
        for name, context in contexts.items():
            config, entropy = self.config[name], entropies[name]
            if entropy is not None:
                entropy = entropy.to(context.sum.device)  # from that of the LM head
                highs[name] = above_threshold(entropy, config.entropy_threshold) > 0
            logits[name] = self.logits(name, context, entropy, features)
            temperatures = config.temperature_high, config.temperature_low
            competes = config.routing.retain_competes
            softmax = temperatures, config.top_k, competes, entropy is None, logits[name].shape[-1]
            alike.setdefault(softmax, []).append(name)
        found: dict[str, Tensor] = {}
        for ((warm, cold), top_k, competes, _, _), names in alike.items():
            if len(names) == 1:
                found[names[0]] = gate(logits[names[0]], highs.get(names[0]), warm, cold, top_k, competes)
                continue
            high = torch.stack([highs[name] for name in names]) if names[0] in highs else None
            together = gate(torch.stack([logits[name] for name in names]), high, warm, cold, top_k, competes)
            found.update(zip(names, together, strict=True))
        return found

    def hold_as_buffers(self) -> None:
        """Make buffers of all weights, for DeepSpeed, which rounds and splits Parameters, frozen ones too."""
        for made in self.alter_router.values():
            for name, parameter in list(made.named_parameters()):
                delattr(made, name)
                made.register_buffer(name, parameter.detach())

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
