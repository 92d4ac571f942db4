# SPDX-License-Identifier: Apache-2.0
"""Pairing: one forget row and one retain row for each example, sampled, collated and checked for overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alter_peft.words import counted


class TokenRows(Protocol):
    """What is read of a set of rows: a `datasets.Dataset` has it, and so has a list of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class PairSampler(Sampler[tuple[int, int]]):
    """Yields (forget index, retain index), as a pure function of (`seed`, epoch).

    An epoch is one permutation of the forget rows, padded up to a multiple of `batch_size` by the beginning of the
    next epoch's permutation. Retain rows run through successive permutations without a break over the epochs: the
    i-th pair of an epoch takes the retain row at position epoch * len(self) + i of that stream. With `batch_size` the
    *global* number of forget rows a step, one process, several processes and gradient accumulation see the same rows
    in the same step.

    Args:
        num_forget: Number of forget rows.
        num_retain: Number of retain rows.
        batch_size: Forget rows a step, over all processes and accumulated batches.
        seed: Seed of the permutations.
    """

    def __init__(self, num_forget: int, num_retain: int, batch_size: int, seed: int) -> None:
        for name, value in (("num_forget", num_forget), ("num_retain", num_retain), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: pass a number of at least 1.")
        if seed < 0:
            raise ValueError(f"seed={seed}: pass a number of at least 0.")
        self.num_forget = num_forget
        self.num_retain = num_retain
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; never counted up by the sampler itself."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_forget // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        forget = self._stream(stream=0, num_rows=self.num_forget, start=self.epoch * self.num_forget)
        retain = self._stream(stream=1, num_rows=self.num_retain, start=self.epoch * len(self))
        for _ in range(len(self)):
            yield next(forget), next(retain)

    def _stream(self, stream: int, num_rows: int, start: int) -> Iterator[int]:
        """Successive permutations of `num_rows` rows, entered at position `start`."""
        number, offset = divmod(start, num_rows)
        while True:
            permutation = np.random.default_rng((self.seed, stream, number)).permutation(num_rows)
            yield from permutation[offset:].tolist()
            number, offset = number + 1, 0


class Epochs(TrainerCallback):
    """Tells the sampler of each epoch, also on a resume within it, where the data loader is another object."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.set_epoch(int(state.epoch or 0))


class PairDataset(torch.utils.data.Dataset[dict[str, dict[str, Any]]]):
    """Pairs of rows: the item (i, j) is `{"forget": row i, "retain": row j}`, each row with its `row_id`.

    A `row_id` is unique over both sets: i for a forget row, len(forget) + j for a retain row.

    Args:
        forget: Rows to forget.
        retain: Rows to keep.
        alternates: The rows to forget with another answer each; the item then has `"alternate"`, row i of these, too.
    """

    def __init__(self, forget: TokenRows, retain: TokenRows, alternates: TokenRows | None = None) -> None:
        self.forget = forget
        self.retain = retain
        self.alternates = alternates

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, dict[str, Any]]:
        i, j = index
        pair = {
            "forget": {**self.forget[i], "row_id": i},
            "retain": {**self.retain[j], "row_id": len(self.forget) + j},
        }
        if self.alternates is not None:
            pair["alternate"] = {**self.alternates[i], "row_id": i}
        return pair


@dataclass
class PairCollator(DataCollatorForLanguageModeling):
    """Collates pairs into one batch [forget rows; retain rows; alternates, if any]. Its only change from TRL's: pairs
    and five columns.

    A row holds `input_ids`, `labels`, `entropy` (one number for each token), `expert` (0 for retain, d = 1..N for a
    forget row of sub-domain d) and `row_id`. Of P pairs the batch has B = 2 P rows, padded on the right to T tokens:
    `input_ids`, `attention_mask` and `labels` as from the parent, `entropy` (float32, (B, T), padded with 0), `expert`
    and `row_id` (long, (B,)). Where there are alternates B = 3 P, and `alternate` (bool, (B,)) marks them. Rows
    that are no pairs, such as evaluation rows, go to the parent as they are.
    """

    def __post_init__(self) -> None:
        if self.padding_free:
            raise ValueError("padding_free=True: the gates need one row for each example; pass padding_free=False.")

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "forget" not in examples[0]:
            return super().torch_call(examples)
        rows = [e["forget"] for e in examples] + [e["retain"] for e in examples]
        if "alternate" not in examples[0]:
            return self.collate_rows(rows)
        batch = self.collate_rows(rows + [e["alternate"] for e in examples])
        batch["alternate"] = torch.arange(3 * len(examples)) >= 2 * len(examples)
        return batch

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of these rows, whichever set they are of."""
        batch = super().torch_call(rows)
        if "entropy" in rows[0]:  # only ALTER measures it
            batch["entropy"] = self._pad_entropy(rows, batch["attention_mask"])
        batch["expert"] = torch.tensor([row["expert"] for row in rows], dtype=torch.long)
        batch["row_id"] = torch.tensor([row["row_id"] for row in rows], dtype=torch.long)
        return batch

    def _pad_entropy(self, rows: list[dict[str, Any]], attention_mask: torch.Tensor) -> torch.Tensor:
        entropy = torch.zeros(attention_mask.shape, dtype=torch.float32)
        for padded, row, length in zip(entropy, rows, attention_mask.sum(dim=1).tolist(), strict=True):
            values = torch.as_tensor(row["entropy"], dtype=torch.float32)
            if len(values) != length:
                raise ValueError(
                    f"entropy of row_id={row['row_id']} has {len(values)} values for {length} tokens: "
                    f"compute it anew from the row's input_ids, truncated as in training."
                )
            padded[:length] = values
        return entropy


def check_disjoint(
    forget: TokenRows, retain: TokenRows, names: tuple[str, str] = ("train_dataset", "retain_dataset")
) -> None:
    """Refuse empty sets, and sets that share a row: it would be forgotten and kept at once.

    Args:
        forget: Tokenised rows, with the column `input_ids`.
        retain: Tokenised rows, with the same column.
        names: What the two are called in the message.

    Raises:
        ValueError: an empty set, or a row in both.
    """
    first, second = names
    for name, rows in ((first, forget), (second, retain)):
        if len(rows) == 0:
            raise ValueError(f"`{name}` has 0 rows. Give at least one.")
    kept: dict[tuple[int, ...], int] = {}
    for j, ids in enumerate(_token_ids(retain)):
        kept.setdefault(ids, j)
    shared = [(i, kept[ids]) for i, ids in enumerate(_token_ids(forget)) if ids in kept]
    if shared:
        i, j = (_given_row(rows, index) for rows, index in zip((forget, retain), shared[0], strict=True))
        fix = "Remove them from either."
        if (i, j) != shared[0]:
            fix = "These are windows of long rows: cut the text that is in both out of either."
        raise ValueError(
            f"`{second}` holds {len(shared)} of the {counted(len(forget), 'row')} of `{first}`, token for token; "
            f"the first is row {i} of `{first}` and row {j} of `{second}`. {fix}"
        )


def _given_row(rows: TokenRows, index: int) -> int:
    """The row that this is, or that it is a window of."""
    return int(rows[index].get("row", index))


def _token_ids(rows: TokenRows) -> Iterator[tuple[int, ...]]:
    selected = rows.select_columns("input_ids") if isinstance(rows, Dataset) else rows
    for index in range(len(selected)):
        row: Mapping[str, Any] = selected[index]
        yield tuple(int(token) for token in row["input_ids"])
