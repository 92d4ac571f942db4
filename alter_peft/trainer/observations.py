# SPDX-License-Identifier: Apache-2.0
"""What the base model makes of rows, in one pass: entropies, what the router reads, log-probabilities of labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from alter_peft.scoring import Pass, ScoredModel, pad_rows
from alter_peft.tuner.base_pass import observe_base, observe_trunk

from .counterfactuals import RouterText


class Observations(NamedTuple):
    """
    The base model's view of a set of rows.

    entropy: S_q of every token, row after row, float32 (total tokens,).
    lengths: tokens of each row, long (rows,).
    averages: c_t of the sampled positions, float32 (sample, k); empty without a context router.
    log_probabilities: ln p of each scored row's labels, in nats, float32 (labels,).
    """

    entropy: Tensor
    lengths: Tensor
    averages: Tensor
    log_probabilities: dict[int, Tensor]


def observe(
    dataset: Dataset,
    scored: ScoredModel,
    adapter_name: str,
    q: float,
    batch_size: int,
    sample: np.ndarray,
    asked: Collection[int] = (),
) -> Observations:
    """
    One pass of the base model over the rows' `input_ids`, longest first, so that little is padded.

    Args:
        adapter_name: whose moving average, of several active adapters.
        sample: positions whose moving average is kept (`sample_positions`); only they are held in memory.
        asked: rows whose `labels` are scored.
    """
    known: dict[int, Tensor] = {}
    gating: Any = scored.gating
    lengths = np.array([len(ids) for ids in dataset["input_ids"]])
    entropies: list[Tensor] = [torch.empty(0)] * len(lengths)
    averages: list[Tensor] = [torch.empty(0)] * len(lengths)
    kept = _within_rows(sample, lengths)
    for rows in tqdm(_batches(lengths, batch_size), desc="Phase I", disable=None):
        given = dataset[rows]
        padded = pad_rows(list(zip(given["input_ids"], given["labels"], strict=True)), scored.device)
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        entropy, hidden, contexts = observe_base(scored.decoder, scored.head, gating, q, inputs)
        labels = padded["labels"][:, 1:]
        labelled = (labels != -100) & torch.tensor([row in asked for row in rows], device=labels.device).unsqueeze(1)
        if labelled.any():
            batch = Pass(rows, labelled, hidden[:, :-1][labelled], labels[labelled])
            with scored.as_base():
                found = batch.split(scored.score(batch.hidden, batch.labels).log_prob.float())
            known |= {row: log_prob for row, log_prob in found if row in asked}
        for i, row in enumerate(rows):
            entropies[row] = entropy[i, : lengths[row]].float().cpu()
            if adapter_name in contexts:
                average = contexts[adapter_name].average()
                averages[row] = average[i, torch.as_tensor(kept[row], device=average.device)].cpu()
    return Observations(torch.cat(entropies), torch.tensor(lengths), torch.cat(averages), known)


def observe_beside(
    texts: Sequence[RouterText], scored: ScoredModel, adapter_name: str, batch_size: int, sample: np.ndarray
) -> Tensor:
    """
    The moving averages at the sampled positions, text after text, (sample, k): a pass of the layers below the router
    alone.

    Args:
        sample: ascending positions of all texts together.
    """
    gating: Any = scored.gating
    lengths = np.array([len(text.ids) for text in texts])
    kept = _within_rows(sample, lengths)
    averages: list[Tensor] = [torch.empty(0)] * len(texts)
    for rows in tqdm(_batches(lengths, batch_size), desc="Other subjects", disable=None):
        padded = pad_rows([(texts[row].ids, texts[row].ids) for row in rows], scored.device)
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        average = observe_trunk(scored.decoder, scored.head, gating, inputs)[adapter_name].average()
        for i, row in enumerate(rows):
            averages[row] = average[i, torch.as_tensor(kept[row], device=average.device)].cpu()
    return torch.cat(averages)


def _batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Which rows are passed together, longest first."""
    order: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _within_rows(sample: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The positions that were drawn of all rows together, ascending, by row, and as places in it."""
    begins = np.cumsum(lengths) - lengths
    parts = np.split(sample, np.searchsorted(sample, begins[1:]))
    return [part - begin for part, begin in zip(parts, begins, strict=True)]
