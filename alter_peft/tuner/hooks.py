# SPDX-License-Identifier: Apache-2.0
"""The hooks that fill the gating state.

The decoder (e.g. `LlamaModel`) and its layer l0 have permanent pre-hooks. The first takes the padding mask and, in the
reference mode, runs the base model; the second routes. Whatever must outlive a pass, the moving average and the base
model's own keys and values, is kept in extra layers of the KV cache itself, so that stock code reorders, crops,
repeats and resets it together with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .base_pass import base_entropy
from .cache import refuse_offloading, router_state, with_cache
from .decoder import LanguageModelHead, padding_mask, with_all_tokens
from .gating import GatingContext
from .moving_average import Context, moving_average
from .token_router import AlterRouter


class DecoderHook:
    """Pre-hook of the decoder: takes the mask, has checkpoints replay the gates, runs the base model if asked to."""

    def __init__(self, context: GatingContext, head: LanguageModelHead) -> None:
        self.context, self.head = context, head

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self.context
        active = context.active()
        if context.base_pass or not active:
            return None
        refuse_offloading(kwargs.get("past_key_values"))
        kwargs = with_all_tokens(kwargs)
        context.begin(padding_mask(args, kwargs, self.head.is_composite))
        if decoder.training and not torch.compiler.is_compiling():
            _replay_gates_in_checkpoints(decoder, context)
        orders = {router.config[n].entropy_q for router, n in active if router.config[n].inference_entropy == "base"}
        if orders and context.entropy is None:
            if len(orders) > 1:
                raise ValueError(f"Adapters that are active together must share `entropy_q`, but found {orders}.")
            kwargs = with_cache(decoder, kwargs)
            context.entropy = base_entropy(decoder, self.head, context, orders.pop(), args, kwargs)
        return args, kwargs


class RouterHook:
    """Pre-hook of decoder layer l0: gates every token of the pass."""

    def __init__(self, context: GatingContext) -> None:
        self.context = context

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self.context
        if context.base_pass and context.observer is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3:
            raise ValueError(
                f"A gated router reads a residual stream of shape (batch, length, width), but this model's is "
                f"{tuple(hidden.shape)}. Use `AlterConfig(router='static')`."
            )
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        for router, name in context.active():
            if router is layer.token_router:
                if name in context.state.gates:  # recomputed: checkpoints of transformers before 5.23 run hooks too
                    continue
                with torch.no_grad():
                    average = self._average(router, name, hidden.detach(), cache)
                    if context.observer is not None:
                        context.observer(name, average)
                    else:
                        context.state.gates[name] = router(
                            name, average, context.entropy_for(name, router.config[name])
                        )

    def _average(self, router: AlterRouter, name: str, hidden: Tensor, cache: Cache | None) -> Context:
        batch, length = hidden.shape[:2]
        mask = self.context.attention_mask
        if mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        else:
            valid = mask[:, -length:].to(hidden.device).bool()
        state = None if cache is None else router_state(cache, name, self.context.num_layers)
        past = None if state is None else state.past()
        average = moving_average(hidden, valid, router.config[name].router_half_life, past)
        if state is not None:
            counts = torch.stack([average.weight, average.count], dim=-1)
            state.update(average.sum.unsqueeze(1), counts.unsqueeze(1))
        return average


class _ReplayingCheckpoint:
    """A layer's own checkpoint function, whose recomputation in backward sees the gates of the first run."""

    def __init__(self, checkpoint: Callable[..., Any], context: GatingContext) -> None:
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the graph recomputes with the gates that it traced
            return self.checkpoint(function, *args)
        state = self.context.state

        def replayed(*args: Any, **kwargs: Any) -> Any:
            with self.context.replaying(state):
                return function(*args, **kwargs)

        return self.checkpoint(replayed, *args)


def _replay_gates_in_checkpoints(decoder: Any, context: GatingContext) -> None:
    for module in decoder.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _ReplayingCheckpoint):
            module._gradient_checkpointing_func = _ReplayingCheckpoint(checkpoint, context)
