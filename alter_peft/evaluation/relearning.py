# SPDX-License-Identifier: Apache-2.0
"""Relearning: an attacker who has the weights fine-tunes them, and what was forgotten comes back, or does not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .answers import Pair, encode_pair
from .base_weights import base_parameters
from .copies import copied
from .measure import Asked, Score, measure


# "{attack}/{set}/{metric}" -> (steps, score) points
Relearned = dict[str, list[tuple[float, Score]]]
STEPS = (0, 1, 2, 5, 10, 20, 50)
LEARNING_RATE = 1e-4


def relearning(
    model: Any, tokenizer: PreTrainedTokenizerBase, forget: Sequence[Pair], related: Sequence[Pair], **options: Any
) -> Relearned:
    """
    Both relearning attacks of Hu et al.: from half of the forget set, and from related text alone.

    The halves are every second row. The attack has succeeded by what the held-out half, or the forget set, gains
    beyond a model that never saw it and is trained on the same rows: rows of a kind help to guess one another.

    Args:
        model: any causal language model, with or without an adapter. It is left as it is.
        forget: at least two rows.
        related: rows of the same kind that are not to be forgotten, retained or never seen.
        options: of `relearn`.

    Returns:
        Curves `relearn_half/held_out/...`, `relearn_half/trained/...` and `relearn_related/forget/...`.

    References:
        Hu et al., "Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via Benign Relearning",
        arXiv 2406.13356. Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?",
        arXiv 2410.08827: held-out facts that cannot be guessed from the trained ones.
    """
    if len(forget) < 2:
        raise ValueError(f"`forget` has {len(forget)} rows, but relearning on half of it needs at least 2.")
    trained, held_out = forget[::2], forget[1::2]
    halves = {"relearn_half/held_out": held_out, "relearn_half/trained": trained}
    return {
        **relearn(model, tokenizer, trained, halves, **options),
        **relearn(model, tokenizer, related, {"relearn_related/forget": forget}, **options),
    }


def relearn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Pair],
    sets: Mapping[str, Sequence[Pair]],
    *,
    steps: Sequence[int] = STEPS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 8,
    metrics: Sequence[str] = ("probability",),
    answered: int | None = None,
    max_new_tokens: int = 40,
    rows_at_once: int | None = None,
    seed: int = 0,
) -> Relearned:
    """
    Fine-tune a copy of a model on some rows, and measure it on sets as it goes.

    All base weights learn, by AdamW at a constant rate on the cross-entropy of the answers; an adapter stays in place
    and frozen. The copy is in float32, since bfloat16 weights would round small steps away: with its gradients and
    moments it takes 16 bytes a parameter. It computes in the precision of the context, without dropout.

    Args:
        model: any causal language model, with or without an adapter. It is left as it is.
        rows: what is trained on.
        sets: name -> questions asked at each of `steps`.
        steps: optimiser steps after which it is measured, 0 being before any.
        learning_rate: an attacker searches for the best one, as Deeb and Roger do (1e-7 to 5e-6 for 8 billion
            parameters in their published configuration). The default is for models of about 135 million: of 2e-5,
            5e-5, 1e-4 and 2e-4 the lowest that brought the most back in 20 steps on the demo, seed 0. On another
            model or another set try several, on the oracle alike.
        batch_size: rows a step; all of them where there are fewer.
        metrics: of `METRICS`.
        answered, max_new_tokens: how many questions of a set are answered in full, all by default, and how long, for
            metrics of the answers.
        rows_at_once: questions of a batch when it is measured; by default as for `Asked`.
        seed: of the order of the rows.

    Returns:
        `"{set}/{metric}"` -> (steps, score) points.

    Raises:
        ValueError: no rows, a rate that is not above 0, or steps that are not whole numbers of at least 0 in
            ascending order.
    """
    if not rows:
        raise ValueError("`rows` is empty. Give at least one question and answer to train on.")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"`steps` is {list(steps)}, but must be whole numbers of at least 0, in ascending order.")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` is {learning_rate}, but must be above 0.")
    attacked = copied(model).eval().requires_grad_(False)
    weights = base_parameters(attacked)
    attacked.float()
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, fused=True)
    batches = _batches(tokenizer, rows, batch_size, seed)
    curves: Relearned = {}
    for step in range(steps[-1] + 1):
        if step:
            batch = {name: value.to(weights[0].device) for name, value in next(batches).items()}
            with torch.enable_grad():
                attacked(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.clear_autocast_cache()  # an autocast context of the caller's would go on with the old weights
        if step in steps:
            for name, pairs in sets.items():
                asked = Asked(attacked, tokenizer, name, pairs, True, answered, max_new_tokens, rows_at_once)
                for key, score in measure(asked, metrics).items():
                    curves.setdefault(key, []).append((float(step), score))
    return curves


def at_step(curve: str, step: float) -> str:
    """The name of the score of a curve after some steps: `"relearn_half/trained, step 20/probability"`."""
    name, _, metric = curve.rpartition("/")
    return f"{name}, step {step:g}/{metric}"


def _batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end: one shuffle of the rows after another."""
    encoded = [encode_pair(tokenizer, pair) for pair in pairs]
    rows = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in encoded]
    collate, shuffle = DataCollatorForLanguageModeling(pad_token_id=0), random.Random(seed)
    size, waiting = min(size, len(rows)), list[dict[str, list[int]]]()
    while True:
        while len(waiting) < size:
            waiting += shuffle.sample(rows, len(rows))
        yield collate(waiting[:size])
        waiting = waiting[size:]
