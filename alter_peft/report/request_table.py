# SPDX-License-Identifier: Apache-2.0
"""What requests one after another leave: a table a method, from the curves of `run_requests`."""

from __future__ import annotations

from collections.abc import Mapping

from alter_peft.evaluation.tables import Table

from .formatting import estimate_text
from .summary import Benchmark, Estimate, Model, estimate


REQUESTS = "requests/"
REQUEST = "request "  # and a number from 1: what that request asks to forget
# what is measured after each request besides -> its row
ROWS = {
    "retain": "retain",
    "real_authors": "real authors",
    "world_facts": "world facts",
    "utility": "utility",
    "forgotten": "forgotten so far",
    "open": "still to come",
}


def request_tables(benchmark: Benchmark) -> list[Table]:
    """A table for each method that was given requests: a row a set and a request, a column a number of requests."""
    found = ((model, after_requests(model)) for model in benchmark.measured)
    return [_table(benchmark, model, means) for model, means in found if means]


def after_requests(model: Model) -> dict[str, dict[int, Estimate]]:
    """Name of a curve of requests -> how many were made -> mean over the seeds that have it; in the order measured."""
    values: dict[str, dict[int, list[float]]] = {}
    for cell in model.results:
        for key, points in cell.curves.items():
            if key.startswith(REQUESTS):
                curve = values.setdefault(key.removeprefix(REQUESTS), {})
                for number, value in points:
                    curve.setdefault(int(number), []).append(value)
    cells = len(model.results)
    return {
        name: {number: mean for number, of_seeds in sorted(curve.items()) if (mean := estimate(of_seeds, cells))}
        for name, curve in values.items()
    }


def request_numbers(means: Mapping[str, object]) -> list[int]:
    """The requests that were measured by themselves, from 1."""
    return sorted(int(name.removeprefix(REQUEST)) for name in means if name.startswith(REQUEST))


def _table(benchmark: Benchmark, model: Model, means: Mapping[str, Mapping[int, Estimate]]) -> Table:
    counts = sorted({number for curve in means.values() for number in curve})
    table = Table(f"Requests: {model.label}", _caption(benchmark), ["after requests", *map(str, counts)])
    requests = request_numbers(means)
    shown = {row: means[name] for name, row in ROWS.items() if name in means}
    shown |= {f"{REQUEST}{number}": means[f"{REQUEST}{number}"] for number in requests}
    made = {number: curve[number] for number in requests if number in (curve := means[f"{REQUEST}{number}"])}
    shown |= {"the request just made": made} if made else {}
    for row, curve in shown.items():
        table.rows.append([row, *(_text(curve[count]) if count in curve else "" for count in counts)])
    return table


def _text(found: Estimate) -> str:
    return estimate_text(found._replace(spread=None))


def _caption(benchmark: Benchmark) -> str:
    caption = (
        "Mean answer probability after so many requests, mean over seeds; of real authors and world facts normalised "
        "by the false answers. Utility: the harmonic mean of the three kept sets."
    )
    level = benchmark.oracle.estimate("forget/probability")
    return caption + (f" The oracles have {estimate_text(level)} on all requests together." if level else "")
