# SPDX-License-Identifier: Apache-2.0
"""What ALTER keeps in the KV cache beside the model's own layers: stock code reorders, crops and resets all alike."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticLayer

from .moving_average import Context


KEPT = 256  # positions of a moving average that outlive a pass


class RouterState(CacheLayerMixin):
    """The moving average of one adapter in the KV cache: (B, 1, T, k) sums and (B, 1, T, 2) weights and counts."""

    keys: Any  # Tensor, or None before the first update
    values: Any
    adapter_name: str
    retain_is_zero = False  # of its adapter, as the last pass of several tokens found it

    def past(self) -> Context | None:
        """The last position, T = 1; at the start of a text `None`, or zeros."""
        if not self.is_initialized:
            return None
        counts = self.values[:, 0, -1:]
        return Context(self.keys[:, 0, -1:], counts[..., 0], counts[..., 1])


class RouterStateLayer(RouterState, DynamicLayer):
    """Only the last position is needed to go on; the last `KEPT` are kept, as assisted decoding crops the cache."""

    def __init__(self, adapter_name: str) -> None:
        super().__init__()
        self.adapter_name = adapter_name
        self.cumulative_length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the last of the positions."""
        length = key_states.shape[-2]
        self.cumulative_length += length
        if self.is_initialized:
            kept = max(0, KEPT - length)
            first = max(0, self.keys.shape[-2] - kept)
            self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
        # a view would keep the whole of it in memory
        last = slice(-KEPT, None) if length > KEPT else slice(None)
        return super().update(key_states[:, :, last], value_states[:, :, last])

    def follow(self, other: RouterStateLayer) -> None:
        """Be where another is, that has read the same."""
        self.keys, self.values, self.cumulative_length = other.keys, other.values, other.cumulative_length
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = other.dtype, other.device, True

    def get_seq_length(self) -> int:
        """Positions seen, those included that are kept no more."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """As the parent's; cropped so deep that the position to go on from is kept no more, the average `is_lost`."""
        if tokens_to_remove > 0:  # earlier releases of transformers give the length to keep
            count = max(0, self.cumulative_length - tokens_to_remove)
        else:
            count = -tokens_to_remove
        if not self.is_initialized or not count:
            return
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        self.cumulative_length = max(0, self.cumulative_length - count)

    @property
    def is_lost(self) -> bool:
        """Whether nothing is kept of the positions seen: an error at the next pass, not in the midst of a crop."""
        return self.cumulative_length > 0 and self.keys.shape[-2] == 0

    def past(self) -> Context | None:
        return super().past() if self.get_seq_length() else None


class StaticRouterStateLayer(RouterState, StaticLayer):
    """`RouterStateLayer` in a static cache, which cannot be cropped: the last position alone, at a fixed address."""

    def __init__(self, adapter_name: str) -> None:
        super().__init__(max_cache_len=1)
        self.adapter_name = adapter_name

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the last of the positions given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.copy_(key_states[:, :, -1:])
        self.values.copy_(value_states[:, :, -1:])
        self.cumulative_length.add_(key_states.shape[-2])
        return self.keys, self.values


def with_cache(config: Any, given: dict[str, Any], cache_name: str | None) -> dict[str, Any]:
    """
    Make the cache that the decoder would make by itself, so that the base pass finds its layers in it.

    Args:
        config: of the decoder.
        given: its arguments by name.
        cache_name: the one that holds the cache.
    """
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = config.use_cache
    if not use_cache or cache_name is None or given.get(cache_name) is not None:
        return given
    return {**given, cache_name: DynamicCache(config=config)}


def refuse_offloading(cache: Cache | None) -> None:
    """Raise a `ValueError` if the layers of this cache are offloaded."""
    if cache is not None and cache.offloading:
        # after the model's last layer it would fetch what is added here, instead of the model's first
        raise ValueError(
            "A gated router cannot use an offloaded `past_key_values`. Leave `cache_implementation` unset or make it "
            "'static', or use `AlterConfig(router='static')`."
        )


def _own_layers(cache: Cache, num_layers: int) -> list[Any]:
    """The model's own layers of a cache, all of them made: what is added comes after them."""
    make_layer: Any = cache.layer_class_to_replicate
    while len(cache.layers) < num_layers:  # a cache made without a config grows layer by layer
        cache.layers.append(make_layer())
    return cache.layers[:num_layers]


def _require_empty(layer: Any, missing: str) -> None:
    if isinstance(layer, CacheLayerMixin) and layer.is_initialized and int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"`past_key_values` was filled without this adapter, so {missing} is missing from it. Start from an empty "
            "cache, or use `AlterConfig(router='static')`."
        )


def _require_same_length(state: RouterState, own: Any) -> None:
    """Raise a `ValueError` unless the router has seen what the model's own layers hold, and can go on from there."""
    if isinstance(state, RouterStateLayer) and state.is_lost:
        raise ValueError(
            f"`past_key_values` was cropped deeper than the last {KEPT} positions, for which the router's moving "
            f"average of adapter {state.adapter_name!r} is kept. Start from an empty cache."
        )
    if not isinstance(own, CacheLayerMixin) or not own.is_initialized:
        return
    if isinstance(state, StaticRouterStateLayer) and torch.compiler.is_compiling():
        return  # these lengths are on the device, and a graph cannot look at them
    seen, length = int(state.get_seq_length()), int(own.get_seq_length())
    if seen != length:
        raise ValueError(
            f"`past_key_values` holds {length} tokens, but the router of adapter {state.adapter_name!r} has seen "
            f"{seen} of them, since the cache was cropped or the adapter was disabled meanwhile. Start from an empty "
            "cache when an adapter is switched."
        )


def router_states(cache: Cache, names: Iterable[str], num_layers: int) -> dict[str, RouterState]:
    """The moving averages of adapters in this cache, made if there are none; a `ValueError` if it is too late."""
    own = _own_layers(cache, num_layers)
    there = {layer.adapter_name: layer for layer in cache.layers[num_layers:] if isinstance(layer, RouterState)}
    for name in names:
        if name in there:
            _require_same_length(there[name], own[-1])
            continue
        # the layers below the router already hold this pass; the last one can only hold an earlier one
        _require_empty(own[-1], "the router's moving average")
        is_static = any(isinstance(layer, StaticLayer) for layer in own)
        state = (StaticRouterStateLayer if is_static else RouterStateLayer)(name)
        # so that stock code that looks for the first layer with or without a window finds one of the model's own
        state.is_sliding = any(getattr(layer, "is_sliding", False) for layer in own)
        cache.layers.append(state)
        there[name] = state
    return there


def base_layers(cache: Cache, num_layers: int) -> list[Any]:
    """The base model's own keys and values in this cache, as `router_state`."""
    own = _own_layers(cache, num_layers)
    mirrored = [layer for layer in cache.layers[num_layers:] if not isinstance(layer, RouterState)]
    if not mirrored:
        _require_empty(own[-1], "the base model's own part")
        mirrored = copy.deepcopy(own)
        cache.layers.extend(mirrored)
    return mirrored
