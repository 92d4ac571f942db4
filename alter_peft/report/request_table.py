# SPDX-License-Identifier: Apache-2.0
"""What requests one after another leave: a table a method."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile

from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tables import Table

from .estimates import Estimate, estimate, estimate_text
from .summary import Benchmark, Model


FORGOTTEN = "forgotten so far"
# sets that are measured after each request beside the requests
SETS = ("retain", "real_authors", "world_facts", "utility", "bystanders", FORGOTTEN, "still to come")


def request_tables(benchmark: Benchmark) -> list[Table]:
    """A table for each method that was given requests: a row a set and a request, a column a number of requests."""
    found = ((model, after_requests(model)) for model in benchmark.measured)
    return [_table(benchmark, model, means) for model, means in found if means]


def after_requests(model: Model) -> dict[str, dict[int, Estimate]]:
    """Set -> how many requests were made -> mean over the seeds that have it."""
    keys = dict.fromkeys(key for scores in model.scores for key in scores.after_requests)
    means: dict[str, dict[int, Estimate]] = {}
    for key in sorted(keys, key=lambda key: key.step or 0):
        found = estimate(model.found(key), len(model.results))
        if found is not None:
            means.setdefault(key.set, {})[int(key.step or 0)] = found
    return means


def requests_of(means: Mapping[str, Mapping[int, Estimate]]) -> dict[int, Mapping[int, Estimate]]:
    """What was asked to be forgotten, by the number of its request from 1."""
    numbers = takewhile(lambda number: f"request {number}" in means, count(1))
    return {number: means[f"request {number}"] for number in numbers}


def _table(benchmark: Benchmark, model: Model, means: Mapping[str, Mapping[int, Estimate]]) -> Table:
    counts = sorted({number for curve in means.values() for number in curve})
    caption = (
        "Mean answer probability after so many requests, mean over seeds; of real authors and world facts normalised "
        "by the false answers. Utility: the harmonic mean of the three kept sets."
    )
    level = benchmark.oracle.estimate(Key("forget", "probability"))
    caption += f" The oracles have {estimate_text(level)} on all requests together." if level else ""
    table = Table(f"Requests: {model.label}", caption, ["after requests", *map(str, counts)])
    requests = requests_of(means)
    shown = {name.replace("_", " "): means[name] for name in SETS if name in means}
    shown |= {f"request {number}": curve for number, curve in requests.items()}
    made = {number: curve[number] for number, curve in requests.items() if number in curve}
    shown |= {"the request just made": made} if made else {}
    for row, curve in shown.items():
        found = (curve.get(number) for number in counts)
        table.rows.append([row, *("" if one is None else estimate_text(one._replace(spread=None)) for one in found)])
    return table
