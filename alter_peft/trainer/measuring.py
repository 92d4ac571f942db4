# SPDX-License-Identifier: Apache-2.0
"""The rows of a training, or some of them, through its model: before the first step, on the way and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alter_peft.losses import TokenScores
from alter_peft.scoring import Row, ScoredModel

from .config import UnlearnConfig
from .damping import TEMPERATURE, guided_by_itself
from .distributed import gathering_layers, reshard
from .reference import guided_by, warn_if_known
from .rivals import score_with_rivals
from .targets import Measured
from .token_targets import Guide
from .token_traits import read_traits


def labelled_rows(dataset: Dataset) -> list[Row]:
    """Token ids and labels of each row."""
    return list(zip(dataset["input_ids"], dataset["labels"], strict=True))


def drawn(count: int, most: int, seed: int) -> list[int]:
    """Of `count` rows `most`, or all, drawn by the seed, the same ones each time; ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort().values.tolist()


class Rows(NamedTuple):
    """
    The rows that are measured, as tokens.

    forget: all of the rows to forget.
    known: the places of those among them that are measured before and after the training.
    retain: the rows to retain that are.
    counted: all rows to retain, whose tokens are counted.
    calibration: rows that the model never saw; `None` without any.
    general: general text that stands for them where there are none.
    """

    forget: Dataset
    known: Sequence[int]
    retain: Dataset
    counted: Dataset
    calibration: Dataset | None
    general: Sequence[Row] = ()


class Means(NamedTuple):
    """Mean log-probabilities by the model as it was after so many steps: by place among the forget rows."""

    step: int
    of_rows: dict[int, float]


class Measuring:
    """
    The rows of a training through its model.

    Args:
        args: of the training.
        scored: the model.
        accelerator: of the training.
        rows: which are measured.
        reference: the model that says which of their tokens give way, where one was given.
        tokenizer: of the rows.
    """

    def __init__(
        self,
        args: UnlearnConfig,
        scored: ScoredModel,
        accelerator: Accelerator,
        rows: Rows,
        reference: str | PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.args, self.scored, self.accelerator = args, scored, accelerator
        self.rows, self.reference, self.tokenizer = rows, reference, tokenizer
        self._seen: Means = Means(-1, {})

    def scores(self, dataset: Dataset | None, batch_size: int, base: bool = False) -> list[TokenScores]:
        """
        Of each row's labels by the model as it is, or by its base, before the training; none without a data set.

        This process alone finds them, or where ZeRO-3 has split the weights, all together.
        """
        return self._scores([] if dataset is None else labelled_rows(dataset), batch_size, base)

    def _scores(self, rows: list[Row], batch_size: int, base: bool) -> list[TokenScores]:
        with self.accelerator.autocast(), gathering_layers(self.scored.model):
            return self.scored.label_scores(rows, batch_size, base=base, by_length=False)

    def log_probabilities(self, dataset: Dataset | None, batch_size: int, base: bool = False) -> list[Tensor]:
        """ln p alone."""
        return [row.log_prob for row in self.scores(dataset, batch_size, base)]

    def guide(self, batch_size: int, base: bool = False) -> Guide | None:
        """
        How likely the rows are to the reference model, or to the model (or its base) with damped feed-forward layers,
        and what their texts alone say; the scores of general text, which stands for unseen rows where there are none.
        `None` for a loss without token targets.
        """
        if "token_targets" not in self.args.loss.needs:
            return None
        forget, general = labelled_rows(self.rows.forget), [*self.rows.general]
        unseen = general if self.rows.calibration is None else labelled_rows(self.rows.calibration)
        vocab_size = self.scored.head.vocab_size if "rival_labels" in self.args.loss.needs else None
        if self.reference is None:
            with self.accelerator.autocast(), gathering_layers(self.scored.model):
                guide = guided_by_itself(
                    self.scored,
                    lambda: score_with_rivals(self.scored, forget, batch_size, vocab_size, TEMPERATURE, base=base),
                )
        else:
            device, options = self.accelerator.device, self.args.model_init_kwargs
            with self.accelerator.autocast():
                guide = guided_by(self.reference, forget, unseen, batch_size, device, options, vocab_size)
            warn_if_known(guide, self.log_probabilities(self.rows.forget, batch_size, base))
        stand_in = {tuple(ids) for ids, _ in general}  # rows to retain may be general text, too
        counted = [row for row in labelled_rows(self.rows.counted) if tuple(row[0]) not in stand_in]
        traits = read_traits(forget, unseen, counted, self.tokenizer)
        return guide._replace(traits=traits, general=self._scores(general, batch_size, base))

    def gap(self, measured: Measured, max_rows: int, wrapped: Any, step: int) -> float:
        """
        Mean distance of forget rows from their targets, in nats, or where tokens have their own, of a row's tokens.

        Of so many rows at most, drawn by the seed, the same ones each time. All processes call this together.

        Args:
            wrapped: as for `means`.
            step: after how many steps; `forget_means` of the same step doesn't pass these rows again.
        """
        places = drawn(len(self.rows.forget), max_rows, self.args.seed)
        of_tokens = [measured.token_targets[place] for place in places] if measured.token_targets else []
        means, distances = self._pass(self.rows.forget.select(places), wrapped, of_tokens)
        before = self._seen.of_rows if self._seen.step == step else {}
        self._seen = Means(step, before | dict(zip(places, means.tolist(), strict=True)))
        return float(distances.mean() if of_tokens else (means - measured.targets[places]).abs().mean())

    def forget_looks(self) -> None:
        """What was seen is of another training."""
        self._seen = Means(-1, {})

    def forget_means(self, wrapped: Any, step: int | None) -> Tensor:
        """
        `means` of the rows to forget that are measured before and after the training.

        Args:
            step: after how many steps; those that `gap` has seen after as many are taken from there. `None`: all are
                passed.
        """
        places = self.rows.known
        seen = self._seen.of_rows if self._seen.step == step else {}
        left = [place for place in places if place not in seen]
        if left:
            found = self.means(self.rows.forget.select(left), wrapped)
            seen = seen | dict(zip(left, found.tolist(), strict=True))
        return torch.tensor([seen[place] for place in places])

    def means(self, dataset: Dataset, wrapped: Any) -> Tensor:
        """
        Mean log-probability of each row's labels, (rows,), in nats, gated as the model will be when it is asked.

        Each process takes its share, and all have the result; all call this together.

        Args:
            dataset: one row at least.
            wrapped: the model in its wrapper, which wants to see the passes.
        """
        return self._pass(dataset, wrapped)[0]

    def _pass(self, dataset: Dataset, wrapped: Any, targets: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """
        `means`, and the mean distances of each row's labels from their targets, (n_i,) each, in nats, (rows,); 0
        without targets.
        """
        rows, world = labelled_rows(dataset), self.accelerator.num_processes
        # as many passes on every process: sharded weights are gathered together
        size, steps = max(1, self.args.per_device_eval_batch_size), -(-len(rows) // world)
        mine = [i * world + self.accelerator.process_index for i in range(-(-steps // size) * size)]
        with self.accelerator.autocast():
            found = self.scored.label_log_probabilities(
                [rows[i % len(rows)] for i in mine], size, by_length=False, model=wrapped
            )
        reshard(self.scored.model)  # a checkpoint may follow
        both = torch.zeros(2, len(rows), device=self.accelerator.device)
        for i, log_prob in zip(mine, found, strict=True):
            if i < len(rows):
                both[0, i] = log_prob.mean()
                both[1, i] = (log_prob - targets[i]).abs().mean() if targets else 0
        means, distances = self.accelerator.reduce(both, "sum").cpu()
        return means, distances
