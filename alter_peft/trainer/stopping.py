# SPDX-License-Identifier: Apache-2.0
"""When to stop: not after so many epochs, but when the forget rows have come to the level of text never seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import logging
from transformers import TrainerCallback, TrainerControl, TrainerState


logger = logging.get_logger(__name__)
# Rows that are measured after each epoch, at most, and before them, to see whether these can be near
MAX_ROWS = 64
PROBED_ROWS = 8


class Stopping(TrainerCallback):
    """
    Ends the training with the first epoch that leaves the forget rows within a tolerance of their targets, on average.

    A run that is resumed from the end of that epoch makes no further step.

    Args:
        gap: how far the rows are from their targets, in nats, measured on so many of them at most.
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
            logger.info(f"Training ends after {state.global_step} steps: the forget rows have come to their level.")

    def _has_reached(self) -> bool:
        gap = self.gap(PROBED_ROWS)
        if gap <= 2 * self.tolerance and self.num_rows > PROBED_ROWS:
            gap = self.gap(MAX_ROWS)
        self.record(gap)
        return gap <= self.tolerance
