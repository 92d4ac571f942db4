# SPDX-License-Identifier: Apache-2.0
"""The hooks that fill the gating state.

The decoder (e.g. `LlamaModel`) and the layer whose input the router reads have permanent pre-hooks. The first takes
the padding mask and, in the reference mode, runs the base model; the second routes. Whatever must outlive a pass, the
moving average and the base model's own keys and values, is kept in extra layers of the KV cache itself, so that stock
code reorders, crops, repeats and resets it together with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .base_pass import base_pass
from .cache import RouterState, RouterStateLayer, refuse_offloading, router_states, with_cache
from .decoder import Decoder, LanguageModelHead, with_all_tokens
from .decoder_call import DecoderCall
from .gating import Found, GatingContext, GatingContexts
from .layer import found_of
from .moving_average import Context, moving_average
from .shares import may_look
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
        context.decoder = decoder
        context.num_layers = min(self.num_layers, self.config.num_hidden_layers)  # fewer in an early exit
        replay_in_checkpoints(decoder, self.contexts)
        orders = {router.config[n].entropy_q for router, n in active if router.config[n].inference_entropy == "base"}
        if orders and context.entropy is None:
            if len(orders) > 1:
                raise ValueError(f"Adapters that are active together must share `entropy_q`, but found {orders}.")
            if not decoder.training:
                given = with_cache(self.config, given, self.call.cache_name)
            context.entropy, _ = base_pass(decoder, self.head, context, orders.pop(), given, self.call.cache_name)
            return (), given
        return args, kwargs


class RouterHook:
    """Pre-hook of the decoder layer whose input the router reads: gates every token of the pass."""

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
        router = layer.token_router
        # those that have gates are recomputed: checkpoints of transformers before 5.23 run hooks too
        names = [name for own, name in context.active() if own is router and name not in context.state.gates]
        if not names:
            return
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        states = {} if cache is None else router_states(cache, names, context.num_layers)
        with torch.no_grad():
            averages = _averages(context, router, names, hidden.detach(), states)
            if context.observer is not None:
                for name in names:
                    context.observer(name, averages[name])
                return
            entropies = {name: context.entropy_for(name, router.config[name]) for name in names}
            context.state.gates.update(router.gates(averages, entropies))
        if may_look([context.state.gates[name] for name in names]):
            found = _found(context, names, states, averages[names[0]])
            context.share_out({name: router.config[name] for name in names}, found)


def _averages(
    context: GatingContext, router: AlterRouter, names: list[str], hidden: Tensor, states: dict[str, RouterState]
) -> dict[str, Context]:
    """The moving averages of this pass, and the cache's own brought up to it."""
    valid, text = context.tokens
    if text is not None:
        text = text.to(hidden.device).expand(hidden.shape[:2])
    averages: dict[str, Context] = {}
    # adapters of one half-life have the same average, for each has read all that the cache holds
    first: dict[float, str] = {}
    for name in names:
        half_life, state = router.config[name].router_half_life, states.get(name)
        assert half_life is not None  # filled in by the config
        if half_life not in first:
            first[half_life] = name
            # its weights may be on another device than the layers below
            here = hidden.to(router.alter_router[name].weight.device)
            if valid is None:
                valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=here.device)
            past = None if state is None else state.past()
            own = None if text is None else text.to(here.device)
            averages[name] = moving_average(here, valid.to(here.device), half_life, past, own)
        else:
            averages[name] = averages[first[half_life]]
        if state is None:
            continue
        leader = states[first[half_life]]
        if state is not leader and isinstance(state, RouterStateLayer) and isinstance(leader, RouterStateLayer):
            state.follow(leader)
        else:
            average = averages[name]
            counts = torch.stack([average.weight, average.count], dim=-1)
            state.update(average.sum.unsqueeze(1), counts.unsqueeze(1))
    return averages


def _found(
    context: GatingContext, names: list[str], states: dict[str, RouterState], average: Context
) -> dict[str, Found]:
    """
    What is found of the adapters' weights. One token that goes on with a cache was computed with the weights that the
    cache was filled with; they are not looked at again.
    """
    goes_on = average.count.shape[1] == 1 and not torch.is_grad_enabled()
    if goes_on and all(name in states and states[name].get_seq_length() > 1 for name in names):
        return {name: Found(states[name].retain_is_zero) for name in names}
    found = found_of(context.decoder, names)
    for name, state in states.items():
        if name in found:
            state.retain_is_zero = found[name].retain_is_zero
    return found


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
