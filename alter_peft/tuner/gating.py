# SPDX-License-Identifier: Apache-2.0
"""How the gates reach the layers: the one state that an adapted model carries through a forward pass.

The decoder (e.g. `LlamaModel`) and its layer l0 have permanent pre-hooks. The first takes the padding mask and, in the
reference mode, runs the base model; the second routes. Whatever must outlive a pass, the moving average and the base
model's own keys and values, is kept in extra layers of the KV cache itself, so that stock code reorders, crops,
repeats and resets it together with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.cache_utils import Cache

from alter_peft.entropy import chunked_tsallis_entropy

from .cache import base_layers, refuse_offloading, router_state, with_cache
from .config import AlterConfig
from .decoder import LanguageModelHead, padding_mask
from .mixed_batch import RowAdapters
from .router import AlterRouter, Context, moving_average


class GateState(NamedTuple):
    """
    What the layers read in one forward pass, and again when checkpointing recomputes it.

    gates: adapter name -> g, (B, T, 1+N).
    learner: the adapter that the rest is about; `None` if it is about all of them.
    owner: (B, 1+N), 1 where an expert learns from a row; `None` if all learn from all rows.
    learns_experts, learns_shared: whether gradients reach the experts and A.
    """

    gates: dict[str, Tensor]
    learner: str | None = None
    owner: Tensor | None = None
    learns_experts: bool = True
    learns_shared: bool = True

    def concerns(self, name: str) -> bool:
        """Whether this adapter is what learns, or what is measured: others that are active act as they always do."""
        return self.learner is None or self.learner == name

    def of_rows(self, rows: list[int]) -> GateState:
        """The state of these rows of the batch alone."""
        return self._replace(gates={name: gates[rows] for name, gates in self.gates.items()})


class GatingContext:
    """The state of one base model, shared by its hooks and by all of its ALTER layers."""

    def __init__(self) -> None:
        self.routers: list[AlterRouter] = []
        self.num_layers = 0
        self.flattens = False  # whether the decoder's layers call some of their own on (B T, k), as OPT's do
        self.state = GateState(gates={})
        self.base_pass = False
        self.mixed: RowAdapters | None = None  # set when each row has an adapter of its own
        # adapter -> temporary scales of its experts, (1+N,) or (B, 1+N): see `ExpertControl.experts`
        self.expert_scales: dict[str, Tensor] = {}
        self.attention_mask: Tensor | None = None
        self.entropy: Tensor | None = None
        self.observer: Callable[[str, Context], None] | None = None
        self._supplied = GateState(gates={})
        self._supplied_entropy: Tensor | None = None

    @contextmanager
    def supply(
        self,
        learner: str | None = None,
        entropy: Tensor | None = None,
        owner: Tensor | None = None,
        learns_experts: bool = True,
        learns_shared: bool = True,
    ) -> Iterator[None]:
        """For the forward passes inside: S_q (B, T) of the base model, and who learns (see `GateState`)."""
        before = self._supplied, self._supplied_entropy
        self._supplied = GateState({}, learner, owner, learns_experts, learns_shared)
        self._supplied_entropy = entropy
        self.begin(None)  # a static router has no hook that would
        try:
            yield
        finally:
            self._supplied, self._supplied_entropy = before

    @contextmanager
    def replaying(self, state: GateState) -> Iterator[None]:
        """The layers inside see the gates of an earlier forward pass."""
        current, self.state = self.state, state
        try:
            yield
        finally:
            self.state = current

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The forward passes inside are the base model's own; gradients are left as they are."""
        before, self.base_pass = self.base_pass, True
        try:
            yield
        finally:
            self.base_pass = before

    def begin(self, attention_mask: Tensor | None) -> None:
        """Start a forward pass with what was supplied for it."""
        self.entropy, self.attention_mask = self._supplied_entropy, attention_mask
        self.state = self._supplied._replace(gates={})

    def active(self) -> list[tuple[AlterRouter, str]]:
        """The enabled routers and their active adapters; in a mixed batch, the adapters of its rows."""
        return [
            (router, name)
            for router in self.routers
            if not router.disable_adapters
            for name in (router.active_adapters if self.mixed is None else self.mixed.adapters)
            if name in router.alter_router
        ]

    def flattened_batch(self, x: Tensor) -> int | None:
        """B, if `x` is the (B T, k) that a decoder has made of its tokens in this pass; `None` if it is not."""
        if not self.flattens or x.dim() != 2:
            return None
        gates = [self.state.gates[name] for _, name in self.active() if name in self.state.gates]
        if not gates:
            return None if self.state.owner is None else self.state.owner.shape[0]
        return gates[0].shape[0] if gates[0].shape[:-1].numel() == x.shape[0] else None

    def entropy_for(self, name: str, config: AlterConfig) -> Tensor | None:
        """S_q (B, T) as this adapter takes it: what was supplied, or the base pass if it asks for one."""
        supplied = self._supplied_entropy is not None and self._supplied.concerns(name)
        return self.entropy if supplied or config.inference_entropy == "base" else None

    def gates_for(self, name: str, h: Tensor) -> Tensor:
        """The gates of an adapter, (B, T, 1+N), for a layer whose A x is `h`; a shape that doesn't fit raises."""
        gates = self.state.gates.get(name)
        if gates is None:
            raise ValueError(
                f"The layers of adapter {name!r} were run without the decoder layer that gates them. Call the whole "
                "model, or use `AlterConfig(router='static')`."
            )
        if gates.shape[:-1] != h.shape[:-1]:
            raise ValueError(
                f"A layer of adapter {name!r} was given an input of shape {tuple(h.shape[:-1])} before its last "
                f"dimension, but its tokens were gated as (batch, length) = {tuple(gates.shape[:-1])}. Exclude this "
                "layer by `exclude_modules`, or use `AlterConfig(router='static')`."
            )
        return gates


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


def base_entropy(
    decoder: nn.Module,
    head: LanguageModelHead,
    context: GatingContext,
    q: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """S_q (B, T) of the base model: a pass without adapters, in eval mode, with its own layers of the KV cache."""
    cache = kwargs.get("past_key_values")
    if cache is not None:
        kwargs = {**kwargs, "past_key_values": Cache(layers=base_layers(cache, context.num_layers))}
    with base_model(decoder, head, context):
        hidden = decoder.forward(*args, **kwargs)[0]
        entropy = chunked_tsallis_entropy(hidden.flatten(0, 1), head, q)
    return entropy.view(hidden.shape[:2])


@contextmanager
def base_model(decoder: nn.Module, head: LanguageModelHead, context: GatingContext) -> Iterator[None]:
    """Inside, decoder and head are the base model's own, in eval mode and without gradients."""
    with torch.no_grad(), context.as_base(), evaluating(decoder), original_modules(decoder, head.module):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards exactly those modules train that did before."""
    training = [child for child in module.modules() if child.training]
    try:
        for child in training:
            child.training = False
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def original_modules(*roots: nn.Module) -> Iterator[None]:
    """Inside, `modules_to_save` are the base model's own; `enable_adapters` would touch their gradients too."""
    kinds = (AuxiliaryTrainingWrapper, TrainableTokensLayer)  # the latter has a switch beside its wrapper's
    wrappers = [module for root in roots for module in root.modules() if isinstance(module, kinds)]
    switched = [wrapper for wrapper in wrappers if not wrapper._disable_adapters]
    try:
        for wrapper in switched:
            wrapper._disable_adapters = True
        yield
    finally:
        for wrapper in switched:
            wrapper._disable_adapters = False


def observe_base(
    decoder: nn.Module, head: LanguageModelHead, context: GatingContext, q: float, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Context]]:
    """S_q (B, T) of the base model and the moving averages of the active adapters, from one pass."""
    averages: dict[str, Context] = {}
    context.begin(inputs["attention_mask"])
    context.observer = averages.__setitem__
    try:
        entropy = base_entropy(decoder, head, context, q, (), {**inputs, "use_cache": False})
    finally:
        context.observer = None
    return entropy, averages


class _Replay:
    """A checkpointed function that sees, also when it is recomputed in backward, the gates of its first run."""

    def __init__(self, function: Callable[..., Any], context: GatingContext) -> None:
        self.function, self.context, self.state = function, context, context.state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context.replaying(self.state):
            return self.function(*args, **kwargs)


class _ReplayingCheckpoint:
    """Stands before a layer's own checkpoint function."""

    def __init__(self, checkpoint: Callable[..., Any], context: GatingContext) -> None:
        self.checkpoint, self.context = checkpoint, context

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the graph recomputes with the gates that it traced
            return self.checkpoint(function, *args)
        return self.checkpoint(_Replay(function, self.context), *args)


def _replay_gates_in_checkpoints(decoder: Any, context: GatingContext) -> None:
    for module in decoder.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _ReplayingCheckpoint):
            module._gradient_checkpointing_func = _ReplayingCheckpoint(checkpoint, context)
