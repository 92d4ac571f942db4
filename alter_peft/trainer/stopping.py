# SPDX-License-Identifier: Apache-2.0
"""When to stop: not after so many epochs, but when the forget rows have come to the level of text never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import logging
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState

from alter_peft.words import counted


logger = logging.get_logger(__name__)
# Rows that are measured after each epoch, at most, and before them, to see whether these can be near
MAX_ROWS = 64
PROBED_ROWS = 8
# A stall: so many epochs, none of which came nearer than any before, by this share. So many times the rates are
# halved, and then training ends. The usual remedy for a descent that circles (torch's ReduceLROnPlateau).
PATIENCE, NEARER = 2, 0.02
CUTS = 3
GAPS = "forget_gaps"  # where the trainer's state, and so a checkpoint, has those of all epochs


class Stopping(TrainerCallback):
    """
    Ends the training with the first epoch that leaves the forget rows within a tolerance of their targets, on average.

    Where they come no nearer for `PATIENCE` epochs, all rates are halved, and after the `CUTS`-th time training ends.
    A run that is resumed from the end of its last epoch makes no further step.

    Args:
        gap: how far the rows are from their targets, in nats, measured on so many of them at most.
        num_rows: how many forget rows there are.
        tolerance: `stopping_tolerance`, in nats.
        record: takes each gap, for the log.

    Attributes:
        reached: whether the rows have come to their targets.
        ended: whether no step is left: they have, or they come no nearer.
    """

    def __init__(
        self, gap: Callable[[int], float], num_rows: int, tolerance: float, record: Callable[[float], None]
    ) -> None:
        self.gap, self.num_rows, self.tolerance, self.record = gap, num_rows, tolerance, record
        self.reached = self.ended = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reached = self.ended = False
        gaps, epochs = _gaps_of(state), float(state.epoch or 0)
        if not state.global_step or not epochs.is_integer():  # not resumed, or within an epoch
            return
        if len(gaps) < epochs:  # the checkpoint was written before the epoch was measured
            self._look(state, kwargs["optimizer"], kwargs["lr_scheduler"])
        else:
            self._decide(gaps)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.ended:  # else it was resumed at its end
            self._look(state, kwargs["optimizer"], kwargs["lr_scheduler"])
        control.should_training_stop = control.should_training_stop or self.ended

    def _look(self, state: TrainerState, optimizer: Optimizer, scheduler: Any) -> None:
        before, gap = _gaps_of(state), self._measured()
        gaps, steps = [*before, gap], counted(state.global_step, "step")
        _entries_of(state)[GAPS] = gaps
        self._decide(gaps)
        if self.reached:
            logger.info(f"Training ends after {steps}: the forget rows have come to their level.")
        elif self.ended:
            logger.warning(
                f"Training ends after {steps}: the forget rows are {min(gaps):.2f} nats from their "
                f"targets and come no nearer (`stopping_tolerance` is {self.tolerance:g}), nor at 1/{2**CUTS} of the "
                "rates."
            )
        elif stalls(gaps) > stalls(before) and halve_rates(optimizer, scheduler):
            logger.info(
                f"The forget rows come no nearer to their targets than {min(gaps):.2f} nats: rates are halved."
            )

    def _decide(self, gaps: Sequence[float]) -> None:
        self.reached = gaps[-1] <= self.tolerance
        self.ended = self.reached or stalls(gaps) > CUTS

    def _measured(self) -> float:
        gap = self.gap(PROBED_ROWS)
        if gap <= 2 * self.tolerance and self.num_rows > PROBED_ROWS:
            gap = self.gap(MAX_ROWS)
        self.record(gap)
        return gap


def stalls(gaps: Sequence[float]) -> int:
    """How many times `PATIENCE` epochs have come no nearer than the nearest before them, by `NEARER` of it."""
    nearest, waited, times = math.inf, 0, 0
    for gap in gaps:
        nearer = gap < (1 - NEARER) * nearest
        nearest, waited = (gap, 0) if nearer else (nearest, waited + 1)
        if waited == PATIENCE:
            waited, times = 0, times + 1
    return times


def halve_rates(optimizer: Optimizer, scheduler: Any) -> bool:
    """Of a schedule that multiplies each rate by a function of the step, as transformers' do; whether it is one."""
    if not isinstance(scheduler, LambdaLR):
        return False
    scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
    for group in optimizer.param_groups:  # of the next step: the schedule sets them after it
        group["lr"] /= 2
    return True


def _entries_of(state: TrainerState) -> dict[str, Any]:
    entries: Any = state.stateful_callbacks
    found: dict[str, Any] = entries
    return found


def _gaps_of(state: TrainerState) -> list[float]:
    return list(_entries_of(state).get(GAPS, []))
