# SPDX-License-Identifier: Apache-2.0
"""Relearning: an attacker who has the weights fine-tunes them, and what was forgotten comes back, or does not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair, encode_pair, labelled_row
from alter_peft.evaluation.base_weights import base_parameters
from alter_peft.evaluation.copies import copied
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.scores import Score
from alter_peft.scoring import Row, pad_rows
from alter_peft.words import counted

from .attack import Attack, Rows


STEPS = (0, 1, 2, 5, 10, 20, 50)


def relearning(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, **options: Any) -> list[Score]:
    """
    Both relearning attacks of Hu et al.: from half of the forget set, and from related text alone, the holdout.

    The halves are every second row. The attack has succeeded by what the `"held-out half"`, or the `"forget after
    related"`, gains beyond a model that never saw it and is trained on the same rows: rows of a kind help to guess one
    another. Where every row has false answers, it is measured by multiple choice as well.

    Args:
        options: of `relearn`.

    References:
        Hu et al., "Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via Benign Relearning",
        arXiv 2406.13356. Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?",
        arXiv 2410.08827: held-out facts that cannot be guessed from the trained ones.
    """
    if len(rows.forget) < 2:
        has = counted(len(rows.forget), "row")
        raise ValueError(f"`forget` has {has}, but relearning on half of it needs at least 2.")
    trained, held_out = rows.forget[::2], rows.forget[1::2]
    if all(pair.wrong for pair in rows.forget):
        options = {"metrics": ("probability", "choice_accuracy"), **options}
    return [
        *relearn(model, tokenizer, rows, trained, {"held-out half": held_out, "trained half": trained}, **options),
        *relearn(model, tokenizer, rows, rows.holdout, {"forget after related": rows.forget}, **options),
    ]


def relearn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    trained: Sequence[Pair],
    sets: Mapping[str, Sequence[Pair]],
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int = 8,
    metrics: Sequence[str] = ("probability",),
    seed: int = 0,
) -> list[Score]:
    """
    Fine-tune a copy of a model on some rows, and measure it on sets as it goes.

    All base weights learn, by AdamW at a constant rate on the cross-entropy of the answers; an adapter stays in place
    and frozen. The copy is in float32, since bfloat16 weights would round small steps away: with its gradients and
    moments it takes 16 bytes a parameter. It computes in the precision of the context, without dropout.

    Args:
        model: any causal language model, with or without an adapter. It is left as it is.
        rows: how questions are asked, and `relearning_rate`: an attacker searches for the best one, as Deeb and Roger
            do (1e-7 to 5e-6 for 8 billion parameters in their published configuration). The default is for models of
            about 135 million: of 2e-5, 5e-5, 1e-4 and 2e-4 the lowest that brought the most back in 20 steps on the
            demo, seed 0. On another model or another set try several, on the oracle alike.
        trained: what is trained on.
        sets: name -> questions asked at each of `steps`.
        steps: optimiser steps after which it is measured, 0 being before any.
        batch_size: rows a step; all of them where there are fewer.
        metrics: of `METRICS`.
        seed: of the order of the rows.

    Returns:
        The scores of each set, whose `step` is that of `steps`.

    Raises:
        ValueError: no rows, a rate that is not above 0, or steps that are not whole numbers of at least 0 in
            ascending order.
    """
    rate = rows.relearning_rate
    if not trained:
        raise ValueError("`trained` is empty. Give at least one question and answer to train on.")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"`steps` is {list(steps)}, but must be whole numbers of at least 0, in ascending order.")
    if not rate > 0:
        raise ValueError(f"`relearning_rate` is {rate}, but must be above 0.")
    attacked = copied(model).eval().requires_grad_(False)
    weights = base_parameters(attacked)
    attacked.float()
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=rate, fused=True)
    batches = _batches(tokenizer, trained, batch_size, seed)
    scores: list[Score] = []
    for step in range(steps[-1] + 1):
        if step:
            with torch.enable_grad():
                attacked(**pad_rows(next(batches), weights[0].device), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.clear_autocast_cache()  # an autocast context of the caller's would go on with the old weights
        if step in steps:
            for name, pairs in sets.items():
                asked = rows.asked(attacked, tokenizer, "relearning", pairs, name, step, relearning_rate=rate)
                scores += measure(asked, metrics)
    return scores


def _batches(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end: one shuffle of the rows after another."""
    rows = [labelled_row(*encode_pair(tokenizer, pair)) for pair in pairs]
    shuffle, size, waiting = random.Random(seed), min(size, len(rows)), list[Row]()
    while True:
        while len(waiting) < size:
            waiting += shuffle.sample(rows, len(rows))
        yield waiting[:size]
        waiting = waiting[size:]


RELEARNING = Attack(
    run=relearning,
    caption="all base weights are trained on half of the forget set, or on related text alone",
    needs=("holdout", "two rows"),
)
