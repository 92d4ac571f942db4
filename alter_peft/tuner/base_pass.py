# SPDX-License-Identifier: Apache-2.0
"""The base model's own pass, through the same modules: its entropy, and what is learned of a text on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.cache_utils import Cache

from alter_peft.entropy import chunked_tsallis_entropy

from .cache import base_layers
from .decoder import LanguageModelHead
from .decoder_call import Tokens
from .gating import GatingContext
from .moving_average import Context


def base_pass(
    decoder: nn.Module,
    head: LanguageModelHead,
    context: GatingContext,
    q: float,
    given: dict[str, Any],
    cache_name: str | None,
) -> tuple[Tensor, Tensor]:
    """
    S_q (B, T) and the last hidden states (B, T, k) of the base model: a pass without adapters, in eval mode, with its
    own layers of the KV cache.

    Args:
        q: order of the entropy.
        given: the decoder's arguments by name.
        cache_name: the one that holds the cache.
    """
    cache = None if cache_name is None else given.get(cache_name)
    if cache_name is not None and cache is not None:
        given = {**given, cache_name: Cache(layers=base_layers(cache, context.num_layers))}
    with base_model(decoder, head, context):
        hidden: Tensor = decoder.forward(**given)[0]
        entropy = chunked_tsallis_entropy(hidden.flatten(0, 1), head, q)
    return entropy.view(hidden.shape[:2]), hidden


@contextmanager
def base_model(decoder: nn.Module, head: LanguageModelHead, context: GatingContext) -> Iterator[None]:
    """Inside, decoder and head are the base model's own, in eval mode and without gradients."""
    with torch.no_grad(), context.as_base(), evaluating(decoder), without_adapters(decoder, head.module):
        yield


@contextmanager
def _all_set(modules: Iterable[Any], name: str, value: bool) -> Iterator[None]:
    """Inside, this switch of the modules has this value; afterwards exactly those that had the other one have it."""
    changed = [module for module in modules if getattr(module, name) is not value]
    try:
        for module in changed:
            setattr(module, name, value)
        yield
    finally:
        for module in changed:
            setattr(module, name, not value)


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Eval mode inside; afterwards exactly those modules train that did before."""
    return _all_set(module.modules(), "training", False)


def without_adapters(*roots: nn.Module, kinds: tuple[type, ...] = ()) -> AbstractContextManager[None]:
    """
    Inside, `modules_to_save` are the base model's own; `enable_adapters` would touch what learns too.

    Args:
        kinds: other modules that have an adapter each.
    """
    kinds = (AuxiliaryTrainingWrapper, TrainableTokensLayer, *kinds)  # the latter has a switch beside its wrapper's
    wrappers = [module for root in roots for module in root.modules() if isinstance(module, kinds)]
    return _all_set(wrappers, "_disable_adapters", True)


def observe_base(
    decoder: nn.Module, head: LanguageModelHead, context: GatingContext, q: float, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Context]]:
    """S_q (B, T) and last hidden states (B, T, k) of the base model, and the active adapters' moving averages."""
    averages: dict[str, Context] = {}
    context.begin(Tokens(inputs["attention_mask"].bool()))
    context.observer = averages.__setitem__
    try:
        entropy, hidden = base_pass(decoder, head, context, q, {**inputs, "use_cache": False}, None)
    finally:
        context.observer = None
    return entropy, hidden, averages


class _Observed(Exception):
    """All that is to be observed in a pass has been: the layers above need not run."""


def observe_trunk(
    decoder: nn.Module, head: LanguageModelHead, context: GatingContext, inputs: dict[str, Tensor]
) -> dict[str, Context]:
    """The moving averages of the active adapters alone: the pass ends where the last of them is known."""
    averages: dict[str, Context] = {}
    wanted = {name for _, name in context.active()}

    def observer(name: str, average: Context) -> None:
        averages[name] = average
        if averages.keys() == wanted:
            raise _Observed

    context.begin(Tokens(inputs["attention_mask"].bool()))
    context.observer = observer
    try:
        with suppress(_Observed), base_model(decoder, head, context):
            decoder.forward(**inputs, use_cache=False)
    finally:
        context.observer = None
    return averages
