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
from torch import Tensor
from transformers.cache_utils import Cache

from .base_pass import base_entropy
from .cache import refuse_offloading, router_state, with_cache
from .decoder import Decoder, LanguageModelHead, with_all_tokens
from .decoder_call import DecoderCall
from .gating import GatingContext, GatingContexts
from .moving_average import Context, moving_average
from .token_router import AlterRouter


class DecoderHook:
    """Pre-hook of the decoder: takes the mask, has checkpoints replay the gates, runs the base model if asked to."""

    def __init__(self, contexts: GatingContexts, head: LanguageModelHead, decoder: Decoder, config: Any) -> None:
        self.contexts, self.head, self.config = contexts, head, config
        self.num_layers = len(decoder.layers)
        self.call = DecoderCall(decoder.module, head.is_composite)

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self.contexts.here
        active = context.active()
        if context.base_pass or not active:
            return None
        kwargs = with_all_tokens(kwargs)
        given = self.call.arguments(args, kwargs)
        refuse_offloading(self.call.cache(given))
        context.begin(self.call.tokens(given))
        context.num_layers = min(self.num_layers, self.config.num_hidden_layers)  # fewer in an early exit
        replay_in_checkpoints(decoder, self.contexts)
        orders = {router.config[n].entropy_q for router, n in active if router.config[n].inference_entropy == "base"}
        if orders and context.entropy is None:
            if len(orders) > 1:
                raise ValueError(f"Adapters that are active together must share `entropy_q`, but found {orders}.")
            if not decoder.training:
                given = with_cache(self.config, given, self.call.cache_name)
            context.entropy = base_entropy(decoder, self.head, context, orders.pop(), given, self.call.cache_name)
            return (), given
        return args, kwargs


class RouterHook:
    """Pre-hook of decoder layer l0: gates every token of the pass."""

    def __init__(self, contexts: GatingContexts) -> None:
        self.contexts = contexts

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = self.contexts.here
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
                    # its weights may be on another device than the layers below
                    hidden = hidden.detach().to(router.alter_router[name].weight.device)
                    average = _average(context, router, name, hidden, cache)
                    if context.observer is not None:
                        context.observer(name, average)
                    else:
                        context.state.gates[name] = router(
                            name, average, context.entropy_for(name, router.config[name])
                        )


def _average(context: GatingContext, router: AlterRouter, name: str, hidden: Tensor, cache: Cache | None) -> Context:
    """The moving average of this pass, and the cache's own brought up to it."""
    valid, text = context.tokens
    if valid is None:
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if text is not None:
        text = text.to(hidden.device).expand(hidden.shape[:2])
    state = None if cache is None else router_state(cache, name, context.num_layers)
    past = None if state is None else state.past()
    half_life = router.config[name].router_half_life
    assert half_life is not None  # filled in by the config
    average = moving_average(hidden, valid.to(hidden.device), half_life, past, text)
    if state is not None:
        counts = torch.stack([average.weight, average.count], dim=-1)
        state.update(average.sum.unsqueeze(1), counts.unsqueeze(1))
    return average


class _ReplayingCheckpoint:
    """A layer's own checkpoint function, whose recomputation in backward sees the gates of the first run."""

    def __init__(self, checkpoint: Callable[..., Any], contexts: GatingContexts) -> None:
        self.checkpoint, self.contexts = checkpoint, contexts

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the graph recomputes with the gates that it traced
            return self.checkpoint(function, *args)
        state = self.contexts.here.state

        def replayed(*args: Any, **kwargs: Any) -> Any:
            with self.contexts.here.replaying(state):  # autograd may run it in a thread of its own
                return function(*args, **kwargs)

        return self.checkpoint(replayed, *args)


def replay_in_checkpoints(decoder: Any, contexts: GatingContexts) -> None:
    """Where layers are recomputed in the backward pass, they see the gates, and who learns, of the forward pass."""
    if not decoder.training or torch.compiler.is_compiling():
        return
    for module in decoder.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _ReplayingCheckpoint):
            module._gradient_checkpointing_func = _ReplayingCheckpoint(checkpoint, contexts)
