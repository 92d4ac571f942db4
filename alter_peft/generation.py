# SPDX-License-Identifier: Apache-2.0
"""What a model says after some prompts, by the probabilities that scoring reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from .scoring import ScoredModel
from .tuner.base_pass import evaluating


@torch.no_grad()
def continuations(
    scored: ScoredModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_token_id: int, **options: Any
) -> list[list[int]]:
    """
    The token ids that the model gives after each prompt: greedily, unless `options` of `generate` say otherwise.

    Of the model's own `generation_config` the special tokens count alone. In eval mode, and in the precision of the
    context. It ends where the model has no more positions.

    Args:
        prompts: token ids, of one batch, each with one at least.
    """
    model: Any = scored.model
    ids, mask = (
        pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side="left"
        ).to(scored.device)
        for rows, value in ((prompts, pad_token_id), ([[1] * len(prompt) for prompt in prompts], 0))
    )
    limit = scored.positions
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])
    with evaluating(model), _own_probabilities(model), _casting_once(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=room,
            **{"do_sample": False, "pad_token_id": pad_token_id, **options},
        )
    found: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return found


@contextmanager
def _own_probabilities(model: Any) -> Iterator[None]:
    """Inside, `generate` knows the special tokens of the model's `generation_config` and nothing else of it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = model.generation_config
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    holders = [one for one in (model, base) if "generation_config" in one.__dict__]
    before = [one.generation_config for one in holders]
    try:
        for one in holders:
            one.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        for one, config in zip(holders, before, strict=True):
            one.generation_config = config


@contextmanager
def _casting_once(model: Any) -> Iterator[None]:
    """
    Inside, where no gradient is taken, autocast keeps the lower-precision copy of every weight until it is left.

    By itself it does so for weights that require gradients alone, and casts frozen ones, such as all those under an
    adapter, anew for each token. In the end the copies are dropped: weights may change within the caller's context.
    """
    if not torch.is_autocast_enabled(next(model.parameters()).device.type):
        yield
        return
    frozen = [p for p in model.parameters() if p.is_floating_point() and not (p.requires_grad or p.is_inference())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        torch.clear_autocast_cache()
