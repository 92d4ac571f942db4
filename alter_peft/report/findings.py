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


KEEPS, RISES = "bystanders' P at least {} of before", "nothing kept better by more than {}"
DISTANCE = "Mean distance to the oracles in units of their spread, best first"
HARMONIC = "Harmonic mean of forgetting and utility, best first"
BYSTANDERS = "Bystanders' probability as a share of before, best first"
KEPT_BETTER = "Largest rise of a kept set's probability above before, least first"
ATTACKED = "Answer probability beyond the oracles' under the attack where that is most, least first"
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
        lowest: whether lower is better.
        is_rank: whether a method has to have the best mean of all, instead.
        finding: what a sentence calls the ranking of all methods, if there is one.
    """

    name: str
    of: Callable[[Model], list[float | None]]
    met: Callable[[float], bool] = lambda value: True
    digits: int = 3
    sign: str = ""
    lowest: bool = False
    is_rank: bool = False
    finding: str = ""


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

    of_em, of_es = each(farthest("exact_memorization")), each(farthest("extraction_strength"))
    found = [
        Criterion("first in the mean distance", distance, digits=1, lowest=True, is_rank=True, finding=DISTANCE),
        Criterion("first in the harmonic mean", each(balance.both), is_rank=True, finding=HARMONIC),
        Criterion(KEEPS.format(KEPT_SHARE), each(balance.bystanders), lambda v: v >= KEPT_SHARE, finding=BYSTANDERS),
        Criterion(f"exact memorisation within {UNITS:g} units", of_em, lambda v: v <= UNITS, digits=1),
        Criterion(f"extraction strength within {UNITS:g} units", of_es, lambda v: v <= UNITS, digits=1),
        Criterion(f"PrivLeak within ±{LEAK:g}", each(leak), lambda v: abs(v) <= LEAK, digits=1, sign="+"),
        Criterion(
            RISES.format(RISE), each(balance.kept_better), lambda v: v <= RISE,
            sign="+", lowest=True, finding=KEPT_BETTER,
        ),
    ]  # fmt: skip
    compared = len(benchmark.methods) > 1  # one alone is no first
    return [
        one
        for one in found
        if any(numbers(one, model) for model in benchmark.methods) and (compared or not one.is_rank)
    ]


def numbers(criterion: Criterion, model: Model) -> list[float]:
    """Of the seeds that have one."""
    return [value for value in criterion.of(model) if value is not None]


def is_met(criterion: Criterion, model: Model, benchmark: Benchmark) -> bool | None:
    """Whether all seeds that have a number meet it, or their mean is the first of all methods; `None` without."""
    own = numbers(criterion, model)
    if not own:
        return None
    if not criterion.is_rank:
        return all(map(criterion.met, own))
    return mean(own) == ranking(criterion, benchmark)[0][1]


def ranking(criterion: Criterion, benchmark: Benchmark) -> list[tuple[Model, float]]:
    """The methods that have a number, best first, with its mean."""
    found = [(model, mean(own)) for model in benchmark.methods if (own := numbers(criterion, model))]
    return sorted(found, key=lambda one: one[1], reverse=not criterion.lowest)


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
    of_seeds = sum(map(criterion.met, own)) if not criterion.is_rank else 0
    answer = "yes" if met else "no" if not of_seeds else f"no ({of_seeds} of {len(own)} seeds)"
    return f"{estimate_text(over, criterion.digits, criterion.sign)}: {answer}"


def findings(benchmark: Benchmark) -> list[str]:
    """A sentence each: who is first in what, what became of what is kept, and the criteria that each method meets."""
    found = criteria(benchmark)
    lines = [f"{one.finding}: {_ranked(one, benchmark)}." for one in found if one.finding]
    attacked = [(model, most) for model in benchmark.methods if (most := _most(model, benchmark)) is not None]
    if attacked:
        attacked.sort(key=lambda one: one[1][0])
        named = (f"{model.name} {gain:+.3f} ({key._replace(metric='')})" for model, (gain, key) in attacked)
        lines.append(f"{ATTACKED}: {', '.join(named)}.")
    met = [(model, [one for one in found if is_met(one, model, benchmark)]) for model in benchmark.methods]
    met.sort(key=lambda of_model: -len(of_model[1]))
    return [*lines, f"Criteria met, of {len(found)}: {', '.join(_met(*one) for one in met)}."] if found else []


def _most(model: Model, benchmark: Benchmark) -> tuple[float, Key] | None:
    """What an attack on the answer probability gives at most beyond the oracles' under the same, and which does."""
    gains = [
        (mean(own) - band.center, key)
        for key, band in benchmark.attack_bands.items()
        if key.metric == "probability" and (own := model.found(key))
    ]
    return max(gains, default=None, key=lambda gain: gain[0])


def _ranked(criterion: Criterion, benchmark: Benchmark) -> str:
    form = f"{criterion.sign}.{criterion.digits}f"
    return ", ".join(f"{model.name} {value:{form}}" for model, value in ranking(criterion, benchmark))


def _met(model: Model, met: Sequence[Criterion]) -> str:
    names = f" ({'; '.join(one.name for one in met)})" if met else ""
    return f"{model.label} {len(met)}{names}"
