# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found, in a few lines and as criteria that are met or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from alter_peft.evaluation.metrics.membership import privleak
from alter_peft.evaluation.oracle import AUC
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tables import Table
from alter_peft.evaluation.tasks.tofu import FORGET_SETS

from .balance import Balance
from .estimates import estimate, estimate_text
from .score_tables import note_failed
from .summary import MEAN, Benchmark, Model


UNITS, LEAK, KEPT_SHARE, RISE = 2.0, 10.0, 0.9, 0.01
Of = Callable[[Mapping[Key, float]], float | None]


class Criterion(NamedTuple):
    """
    What is asked of each seed of a method.

    Attributes:
        name: what the row is called.
        of: the number of each seed, `None` for one that lacks a score of it.
        met: whether such a number is good enough.
        digits, sign: of the numbers in the table.
        lowest_is_first: whether a method has to have the lowest mean of all; the highest if `False`.
    """

    name: str
    of: Callable[[Model], list[float | None]]
    met: Callable[[float], bool] = lambda value: True
    digits: int = 3
    sign: str = ""
    lowest_is_first: bool | None = None


def criteria(benchmark: Benchmark) -> list[Criterion]:
    """Those that some method has numbers for."""
    balance = Balance(benchmark)

    def each(function: Of) -> Callable[[Model], list[float | None]]:
        return lambda model: [function(values) for values in model.values]

    def farthest(metric: str) -> Of:
        keys = [Key(name, metric) for name in FORGET_SETS]

        def find(values: Mapping[Key, float]) -> float | None:
            distances = benchmark.distances(values)
            return max((abs(distances[key]) for key in keys if key in distances), default=None)

        return find

    def leak(values: Mapping[Key, float]) -> float | None:
        levels = benchmark.oracle.found(AUC)
        return privleak(values[AUC], levels) if AUC in values and levels and any(levels) else None

    def distance(model: Model) -> list[float | None]:
        return [one[MEAN] for one in benchmark.summaries(model)]

    found = [
        Criterion("first in the mean distance", distance, digits=1, lowest_is_first=True),
        Criterion("first in the harmonic mean", each(balance.both), lowest_is_first=False),
        Criterion(
            f"bystanders' P at least {KEPT_SHARE} of before", each(balance.bystanders), lambda v: v >= KEPT_SHARE
        ),
        Criterion(f"exact memorisation within {UNITS:.0f} units", each(farthest("exact_memorization")), _within, 1),
        Criterion(f"extraction strength within {UNITS:.0f} units", each(farthest("extraction_strength")), _within, 1),
        Criterion(f"PrivLeak within ±{LEAK:.0f}", each(leak), lambda value: abs(value) <= LEAK, 1, "+"),
        Criterion(f"nothing kept better by more than {RISE}", each(balance.kept_better), lambda v: v <= RISE, 3, "+"),
    ]
    return [one for one in found if any(numbers(one, model) for model in benchmark.methods)]


def _within(value: float) -> bool:
    return value <= UNITS


def numbers(criterion: Criterion, model: Model) -> list[float]:
    """Of the seeds that have one."""
    return [value for value in criterion.of(model) if value is not None]


def is_met(criterion: Criterion, model: Model, benchmark: Benchmark) -> bool | None:
    """Whether all seeds that have a number meet it, or their mean is the first of all methods; `None` without."""
    own = numbers(criterion, model)
    if not own:
        return None
    if criterion.lowest_is_first is None:
        return all(map(criterion.met, own))
    return ranking(criterion, benchmark)[0][0] is model


def ranking(criterion: Criterion, benchmark: Benchmark) -> list[tuple[Model, float]]:
    """The methods that have a number, best first, with its mean."""
    found = [(model, mean(own)) for model in benchmark.methods if (own := numbers(criterion, model))]
    return sorted(found, key=lambda one: one[1], reverse=criterion.lowest_is_first is False)


def criteria_table(benchmark: Benchmark) -> Table | None:
    """A row a criterion, a column a method: its number, and whether it is met; `None` if there are none."""
    found = criteria(benchmark)
    if not found:
        return None
    caption = (
        "yes: of every seed; of what is to be first, of the mean over seeds. Distances are the farthest of the forget "
        "sets, in the oracles' units; P and its rise are beside the target's."
    )
    table = Table("Criteria", caption, ["criterion", *(model.label for model in benchmark.methods)])
    for criterion in found:
        table.rows.append([criterion.name, *(_cell(criterion, model, benchmark) for model in benchmark.methods)])
    return note_failed(table, benchmark)


def _cell(criterion: Criterion, model: Model, benchmark: Benchmark) -> str:
    own = numbers(criterion, model)
    over = estimate(own, len(model.results))
    if over is None:
        return ""
    met = is_met(criterion, model, benchmark)
    of_seeds = sum(map(criterion.met, own)) if criterion.lowest_is_first is None else 0
    answer = "yes" if met else "no" if not of_seeds else f"no ({of_seeds} of {len(own)} seeds)"
    return f"{estimate_text(over, criterion.digits, criterion.sign)}: {answer}"


def findings(benchmark: Benchmark) -> list[str]:
    """A sentence each: who is first in what, what became of bystanders, and the criteria that each method meets."""
    found, lines = criteria(benchmark), []
    for criterion in found:
        if criterion.lowest_is_first is not None:
            what = criterion.name.removeprefix("first in the ")
            lines.append(f"{what.capitalize()}, best first: {_ranked(criterion, ranking(criterion, benchmark))}.")
    for criterion in found:
        if criterion.name.startswith("bystanders"):
            ranked = sorted(ranking(criterion, benchmark), key=lambda one: -one[1])
            lines.append(f"Bystanders' probability, as a share of before: {_ranked(criterion, ranked)}.")
    lines += [_met(found, model, benchmark) for model in benchmark.methods]
    return lines


def _ranked(criterion: Criterion, ranked: Sequence[tuple[Model, float]]) -> str:
    return ", ".join(f"{model.name} {value:.{criterion.digits}f}" for model, value in ranked)


def _met(found: Sequence[Criterion], model: Model, benchmark: Benchmark) -> str:
    answers = {one.name: met for one in found if (met := is_met(one, model, benchmark)) is not None}
    missed = [name for name, met in answers.items() if not met]
    rest = f"; not {'; not '.join(missed)}" if missed else ""
    return f"{model.label} meets {len(answers) - len(missed)} of {len(answers)} criteria{rest}."
