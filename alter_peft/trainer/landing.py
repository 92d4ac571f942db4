# SPDX-License-Identifier: Apache-2.0
"""When to stop: not after so many epochs, but when the forget rows have come to the level of text never seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import logging
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainerControl, TrainerState

from alter_peft.losses import score_tokens
from alter_peft.tuner.base_pass import evaluating


if TYPE_CHECKING:
    from .trainer import AlterUnlearnTrainer


logger = logging.get_logger(__name__)
# Rows that are measured after each epoch, at most, and before them, to see whether these can be near
MAX_ROWS = 64
PROBED_ROWS = 8


class Landing(TrainerCallback):
    """Ends the training with the first epoch that leaves the forget rows within `landing_tolerance`, on average.

    A run that is resumed from the end of that epoch makes no further step.
    """

    def __init__(self, trainer: AlterUnlearnTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        resumed_between_epochs = state.global_step > 0 and float(state.epoch or 0).is_integer()
        self.trainer.landed = resumed_between_epochs and self._has_landed(args)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.landed = self.trainer.landed or self._has_landed(args)
        if self.trainer.landed:
            control.should_training_stop = True
            logger.info(f"Training ends after {state.global_step} steps: the forget rows have come to their level.")

    def _has_landed(self, args: Any) -> bool:
        gap = mean_gap(self.trainer, PROBED_ROWS)
        if gap <= 2 * float(args.landing_tolerance) and len(self.trainer._forget) > PROBED_ROWS:
            gap = mean_gap(self.trainer, MAX_ROWS)
        self.trainer._metrics["train"]["forget_gap"].append(gap)
        return gap <= float(args.landing_tolerance)


@torch.no_grad()
def mean_gap(trainer: AlterUnlearnTrainer, max_rows: int) -> float:
    """
    Mean over the forget rows of |mean log-probability - target|, in nats, gated as the model will be when it is asked.

    Of many rows, `max_rows` at most, drawn by the seed, the same ones each time. Each process takes its share; all
    call this together.
    """
    accelerator, generator = trainer.accelerator, torch.Generator().manual_seed(trainer.args.seed)
    drawn = torch.randperm(len(trainer._forget), generator=generator)[:max_rows].sort().values
    rows, targets = trainer._forget.select(drawn), trainer.objective.targets[drawn]
    size, world = max(1, trainer.args.per_device_eval_batch_size), accelerator.num_processes
    total = torch.zeros(2, device=accelerator.device)
    # as many passes on every process: sharded weights are gathered together
    for start in range(0, -(-len(rows) // world), size):
        mine = [i * world + accelerator.process_index for i in range(start, start + size)]
        part = rows[[i % len(rows) for i in mine]]
        ids, labels, mask = (
            pad_sequence([torch.as_tensor(values) for values in column], batch_first=True, padding_value=padding).to(
                accelerator.device
            )
            for column, padding in (
                (part["input_ids"], 0), (part["labels"], -100), ([[1] * len(row) for row in part["input_ids"]], 0)
            )
        )  # fmt: skip
        with evaluating(trainer.model), accelerator.autocast():
            hidden = trainer.decode(trainer.model_wrapped, ids, mask)[:, :-1]
            labelled = labels[:, 1:] != -100
            scores = score_tokens(hidden[labelled], trainer.head, labels[:, 1:][labelled])
        for i, log_prob in zip(mine, scores.log_prob.float().split(labelled.sum(dim=1).tolist()), strict=True):
            if i < len(rows):
                total += torch.stack([(log_prob.mean() - targets[i]).abs(), log_prob.new_ones(())])
    gaps, count = accelerator.reduce(total, "sum").tolist()
    return float(gaps / count)
