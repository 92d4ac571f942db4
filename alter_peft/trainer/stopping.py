# SPDX-License-Identifier: Apache-2.0
"""When to stop: not after so many epochs, but when the forget rows have come to the level of text never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator, logging
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from alter_peft.scoring import Row, ScoredModel
from alter_peft.words import counted

from .measuring import row_means


logger = logging.get_logger(__name__)
# Rows that are measured after each epoch, at most, and before them, to see whether these can be near
MAX_ROWS = 64
PROBED_ROWS = 8


class Stopping(TrainerCallback):
    """
    Ends the training with the first epoch that leaves the forget rows within a tolerance of their targets, on average.

    A run that is resumed from the end of that epoch makes no further step.

    Args:
        gap: how far the rows are from their targets, in nats, measured on so many of them at most (see `mean_gap`).
        num_rows: how many forget rows there are.
        tolerance: `stopping_tolerance`, in nats.
        record: takes each gap, for the log.

    Attributes:
        reached: whether the rows have come to their targets.
    """

    def __init__(
        self, gap: Callable[[int], float], num_rows: int, tolerance: float, record: Callable[[float], None]
    ) -> None:
        self.gap, self.num_rows, self.tolerance, self.record = gap, num_rows, tolerance, record
        self.reached = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        resumed_between_epochs = state.global_step > 0 and float(state.epoch or 0).is_integer()
        self.reached = resumed_between_epochs and self._has_reached()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reached = self.reached or self._has_reached()
        if self.reached:
            control.should_training_stop = True
            after = counted(state.global_step, "step")
            logger.info(f"Training ends after {after}: the forget rows have come to their level.")

    def _has_reached(self) -> bool:
        gap = self.gap(PROBED_ROWS)
        if gap <= 2 * self.tolerance and self.num_rows > PROBED_ROWS:
            gap = self.gap(MAX_ROWS)
        self.record(gap)
        return gap <= self.tolerance


def mean_gap(
    scored: ScoredModel,
    rows: Sequence[Row],
    targets: Tensor,
    token_targets: Sequence[Tensor],
    accelerator: Accelerator,
    batch_size: int,
    wrapped: Any,
) -> float:
    """
    Mean over rows of |mean log-probability - target|, or where tokens have targets of their own, of the mean distance
    of a row's tokens, in nats, gated as the model will be when it is asked.

    Each process takes its share; all call this together.

    Args:
        rows: forget rows, one at least.
        targets: of these rows, (rows,), in nats.
        token_targets: of their labels, (n_i,) each; or none.
        wrapped: the model in its wrapper, which wants to see the passes.
    """
    means = row_means(scored, rows, accelerator, batch_size, wrapped, token_targets)
    return float(means.mean() if token_targets else (means - targets).abs().mean())
