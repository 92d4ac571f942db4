# SPDX-License-Identifier: Apache-2.0
"""What a metric says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from alter_peft.evaluation.model_on_set import ModelOnSet


@dataclass(frozen=True, kw_only=True)
class Metric:
    """
    A number of a model on a set of questions.

    Attributes:
        caption: what it is, in one sentence.
        rows: what computes it, one number a question in the order of the set.
        tokens: instead of `rows`, by the name of each score that it makes, which tokens of each answer count, bool
            (n_i,): the rows are their share of each answer, the value that of all tokens.
            A metric with neither is computed by an attack or a task.
        needs: of the questions `"wrong"`, `"rephrased"` (all or none) and `"other words"` (all), of the run
            `"answers"` (the model's own), of the model `"router"`, `"threshold"` and `"judge"`.
        average: how rows become the value, a name of `AVERAGES`.
        average_forget: the same of a set that is to be forgotten; by default as of all others.
        packages: that it needs beside those of the package.
        is_ingredient: whether it is measured for `evaluation.open_unlearning` alone; the report compares it with
            nothing, since another metric says the same of its set.
        is_guard: whether it only tells success from a broken model or a wrong route, and no distance is taken of it.
    """

    caption: str
    range: tuple[float, float] = (0.0, 1.0)
    unit: str = ""
    rows: Callable[[ModelOnSet], Sequence[float]] | None = None
    tokens: Callable[[ModelOnSet], Mapping[str, Sequence[Tensor]]] | None = None
    needs: tuple[str, ...] = ()
    average: str = "mean"
    average_forget: str | None = None
    is_guard: bool = False
    is_ingredient: bool = False
    packages: tuple[str, ...] = ()


def require_rows(**samples: Sequence[float]) -> None:
    """Raise a `ValueError` that names the sample that is empty."""
    for name, values in samples.items():
        if not len(values):
            raise ValueError(f"`{name}` is empty, so there is nothing to compare. Give at least one value.")
