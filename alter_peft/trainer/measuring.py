# SPDX-License-Identifier: Apache-2.0
"""The rows of a training, or some of them, through its model: before the first step, on the way and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from alter_peft.scoring import Row, ScoredModel

from .distributed import reshard


def labelled_rows(dataset: Dataset) -> list[Row]:
    """Token ids and labels of each row."""
    return list(zip(dataset["input_ids"], dataset["labels"], strict=True))


def drawn(count: int, most: int, seed: int) -> list[int]:
    """Of `count` rows `most`, or all, drawn by the seed, the same ones each time; ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort().values.tolist()


def row_means(
    scored: ScoredModel,
    rows: Sequence[Row],
    accelerator: Accelerator,
    batch_size: int,
    wrapped: Any,
    targets: Sequence[Tensor] = (),
) -> Tensor:
    """
    Mean log-probability of each row's labels, (rows,), in nats, gated as the model will be when it is asked.

    Each process takes its share, and all have the result; all call this together.

    Args:
        rows: one at least.
        wrapped: the model in its wrapper, which wants to see the passes.
        targets: of each row's labels, (n_i,) each: then it is the mean distance from them, in nats.
    """
    world = accelerator.num_processes
    # as many passes on every process: sharded weights are gathered together
    size, steps = max(1, batch_size), -(-len(rows) // world)
    mine = [i * world + accelerator.process_index for i in range(-(-steps // size) * size)]
    with accelerator.autocast():
        found = scored.label_log_probabilities(
            [rows[i % len(rows)] for i in mine], size, by_length=False, model=wrapped
        )
    reshard(scored.model)  # a checkpoint may follow
    means = torch.zeros(len(rows), device=accelerator.device)
    for i, log_prob in zip(mine, found, strict=True):
        if i < len(rows):
            means[i] = (log_prob - targets[i]).abs().mean() if targets else log_prob.mean()
    together: Tensor = accelerator.reduce(means, "sum")
    return together.cpu()
