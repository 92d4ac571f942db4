# SPDX-License-Identifier: Apache-2.0
"""When to stop: not after so many epochs, but when the forget rows have come to the level of text never seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import logging
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState

from alter_peft.words import counted


logger = logging.get_logger(__name__)
# Rows that are measured after each epoch, at most, and before them, to see whether these can be near
MAX_ROWS = 64
PROBED_ROWS = 8
# A stall: whole epochs of so many steps or more, none of which came nearer than any before, by this share. So many
# times all rates are halved: the usual remedy for a descent that circles (ReduceLROnPlateau). After that two epochs at
# least that come no nearer, by the smaller share, end the training (docs/log.md).
LEAST_STEPS, NEARER, CUTS = 20, 0.1, 3
LAST_EPOCHS, LAST_NEARER = 2, 0.02
LOOKS = "forget_gaps"  # where the trainer's state, and so a checkpoint, has what was seen after each epoch

Look = tuple[int, float]  # how many rows were measured, and their mean distance from their targets, in nats


class Stopping(TrainerCallback):
    """
    Ends the training with the first epoch that leaves the forget rows within a tolerance of their targets, on average.

    Where they come nearer by less than `NEARER` for `LEAST_STEPS` steps, in whole epochs, all rates are halved, `CUTS`
    times at most, and where they come no nearer then, training ends as well. A run that is resumed from the end of its
    last epoch makes no further step.

    Args:
        gap: how far the rows are from their targets, in nats, measured on so many of them at most (see
            `Measuring.gap`).
        num_rows: how many forget rows there are.
        tolerance: `stopping_tolerance`, in nats.
        record: takes each gap, for the log.

    Attributes:
        reached: whether the rows have come to their targets.
        stalled: whether they have not, and come no nearer.
    """

    def __init__(
        self, gap: Callable[[int], float], num_rows: int, tolerance: float, record: Callable[[float], None]
    ) -> None:
        self.gap, self.num_rows, self.tolerance, self.record = gap, num_rows, tolerance, record
        self.reached = self.stalled = False

    @property
    def ended(self) -> bool:
        """Whether no step is left."""
        return self.reached or self.stalled

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reached = self.stalled = False
        if state.global_step > 0 and float(state.epoch or 0).is_integer():  # resumed between two epochs
            self._look(state, kwargs["lr_scheduler"])

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.ended:  # else it was resumed at its end
            self._look(state, kwargs["lr_scheduler"])
        control.should_training_stop = control.should_training_stop or self.ended

    def _look(self, state: TrainerState, scheduler: Any) -> None:
        """Measure the rows after an epoch, and do what follows; a checkpoint that has the epoch has its rates."""
        entries: Any = state.stateful_callbacks
        looks: dict[str, Look] = dict(entries.get(LOOKS, {}))
        number = round(float(state.epoch or 0))
        epoch, patience = str(number), math.ceil(LEAST_STEPS * number / state.global_step)
        is_new, before = epoch not in looks, stalls([look for when, look in looks.items() if when != epoch], patience)
        looks[epoch] = self._measured()
        entries[LOOKS] = looks
        (_, gap), times = looks[epoch], stalls([*looks.values()], patience)
        schedule = scheduled(scheduler)
        self.reached = gap <= self.tolerance
        self.stalled = not self.reached and times > CUTS and schedule is not None
        after = counted(state.global_step, "step")
        if self.reached:
            logger.info(f"Training ends after {after}: the forget rows have come to their level.")
        elif self.stalled:
            logger.warning(
                f"Training ends after {after}: the forget rows are {gap:.2f} nats from their targets and come no "
                f"nearer (`stopping_tolerance` is {self.tolerance:g}), nor at 1/{2**CUTS} of the rates."
            )
        elif times > before and is_new and schedule is not None:
            halve_rates(schedule)
            logger.info(f"The forget rows come no nearer to their targets than {gap:.2f} nats: rates are halved.")

    def _measured(self) -> Look:
        rows, gap = min(PROBED_ROWS, self.num_rows), self.gap(PROBED_ROWS)
        if gap <= 2 * self.tolerance and self.num_rows > PROBED_ROWS:
            rows, gap = min(MAX_ROWS, self.num_rows), self.gap(MAX_ROWS)
        self.record(gap)
        return rows, gap


def stalls(looks: Sequence[Sequence[float]], patience: int) -> int:
    """
    How many times epochs in a row have come no nearer than the nearest of as many rows before them.

    The first `CUTS` times nearer is by `NEARER`, after these by `LAST_NEARER`, for `LAST_EPOCHS` at least.

    Args:
        looks: a `Look` after each epoch.
        patience: in epochs.
    """
    nearest: dict[float, float] = {}
    waited = times = 0
    for rows, gap in looks:
        last = times >= CUTS
        if gap < (1 - (LAST_NEARER if last else NEARER)) * nearest.get(rows, math.inf):
            nearest[rows], waited = gap, 0
            continue
        waited += 1
        if waited >= (max(LAST_EPOCHS, patience) if last else patience):
            waited, times = 0, times + 1
    return times


def scheduled(scheduler: Any) -> LambdaLR | None:
    """The schedule that multiplies each rate by a function of the step, as most of transformers' do; or `None`."""
    inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler  # under DeepSpeed
    return inner if isinstance(inner, LambdaLR) else None


def halve_rates(schedule: LambdaLR) -> None:
    """All rates of a schedule, from the next step on."""
    schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
    for group in schedule.optimizer.param_groups:  # the schedule sets them after the next step alone
        group["lr"] /= 2
