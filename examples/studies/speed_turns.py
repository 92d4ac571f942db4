# SPDX-License-Identifier: Apache-2.0
"""How speed.py measures: several loops in turn, and what is said of the samples of each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from speed_setting import Setting
from transformers import TrainerCallback


Samples = dict[str, list[float]]
WARM_UP = 4  # steps that are not counted, beside what comes before the first one


class Ratio(NamedTuple):
    """
    One arm over another, as a row of the table.

    what, against: how the table calls the two.
    target: of issue 14, at most.
    by: `"median"` or `"mean"`, which of the two ratios the target is of.
    """

    what: str
    against: str
    arm: str
    other: str
    target: float | None = None
    by: str = "median"


class Found(NamedTuple):
    """Samples of each arm, in turn, and what else was seen."""

    samples: Samples
    notes: dict[str, Any]


class Measurement(NamedTuple):
    """
    caption: what is measured, as the tables say it.
    run: measures it.
    ratios: its rows of the table.
    unit: of the samples.
    of_shapes: whether it is measured of random weights of a known shape, too.
    """

    caption: str
    run: Callable[[Setting], Found]
    ratios: tuple[Ratio, ...] = ()
    unit: str = "s"
    of_shapes: bool = True


def summarized(samples: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(samples, (10, 50, 90)).tolist()
    return {"median": median, "mean": float(np.mean(samples)), "p10": low, "p90": high, "n": len(samples)}


def compared(ratio: Ratio, samples: Samples) -> dict[str, float]:
    """Ratio of the medians and of the means; percentiles of the ratios sample by sample, which are in turn."""
    arm, other = np.array(samples[ratio.arm]), np.array(samples[ratio.other])
    found = {"median": float(np.median(arm) / np.median(other)), "mean": float(arm.mean() / other.mean())}
    if len(arm) == len(other) > 1:
        found["p10"], found["p90"] = np.percentile(arm / other, (10, 90)).tolist()
    return found


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Closed(Exception):
    """Ends a training that nobody lets go on."""


class Steps(TrainerCallback):
    """
    A training as an iterator: `next` lets it go on to the end of its next step, and gives the seconds of that.

    The first item is all that comes before the first step. Between two of them the training stands still, in a
    thread of its own. `rest` is what came behind the last step.
    """

    def __init__(self, trainer: Any) -> None:
        trainer.add_callback(self)
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._closing, self._ended, self.rest = False, False, 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)

    def __iter__(self) -> Iterator[list[float]]:
        return self

    def __next__(self) -> list[float]:
        if self._ended:
            raise StopIteration
        began = now()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stands.acquire()
        seconds = now() - began
        if self._error is not None:
            raise self._error
        if self._ended:
            self.rest = seconds
            raise StopIteration
        return [seconds]

    def close(self) -> None:
        """End the training where it stands."""
        if self._thread.is_alive():
            self._closing = True
            self._go.release()
            self._thread.join()

    def _train(self, trainer: Any) -> None:
        try:
            trainer.train()
        except _Closed:
            pass
        except BaseException as error:  # it is raised where the training is looked at
            self._error = error
        self._ended = True
        self._stands.release()

    def _stand(self) -> None:
        self._stands.release()
        self._go.acquire()
        if self._closing:
            raise _Closed

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stand()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._stand()


def in_turn(arms: dict[str, Iterator[list[float]]], rounds: int, skip: int) -> Samples:
    """What each arm gives, one after another in every round, but for the first rounds."""
    found: Samples = {name: [] for name in arms}
    for turn in range(skip + rounds):
        for name, arm in arms.items():
            given = next(arm)
            if turn >= skip:
                found[name] += given
    return found


def trained_in_turn(arms: dict[str, Any], steps: int, warm_up: int = WARM_UP) -> Samples:
    """Seconds of the steps of each training, step by step in turn."""
    loops = {name: Steps(trainer) for name, trainer in arms.items()}
    try:
        return in_turn(dict(loops), steps, 1 + warm_up)
    finally:
        for loop in loops.values():
            loop.close()


def repeated(call: Callable[[], list[float]]) -> Iterator[list[float]]:
    while True:
        yield call()


def timed(call: Callable[[], Any]) -> list[float]:
    began = now()
    call()
    return [now() - began]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """
    What a function of a module gives in a process of its own.

    Of glibc's own options none is passed on, so that memory which is freed goes back and the peak is what was held.
    """
    kept = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("MALLOC_")}
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.update(kept)


@contextmanager
def empty_cache(setting: Setting) -> Iterator[None]:
    """Inside, nothing that phase I has kept on the disk is found."""
    before = datasets.config.HF_DATASETS_CACHE
    setting.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=setting.output) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
