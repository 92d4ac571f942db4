# SPDX-License-Identifier: Apache-2.0
"""Two-sided distances to the oracle: a row a score, a column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alter_peft.evaluation.oracle import cutoff, spread_of
from alter_peft.evaluation.tables import Table
from alter_peft.evaluation.tasks.tofu import FORGET_SETS

from .formatting import distance_text
from .model_tables import absent, note_failed
from .summary import MODEL_UTILITY, ORACLE, Benchmark, Model, estimate, is_of_set


NO_UNIT = "The oracles agree exactly on this score, of which there are no rows: no unit."


def distance_table(benchmark: Benchmark) -> Table:
    """A row a score: the oracles' mean and unit, each oracle against the others, each model; then the summaries."""
    models = [model for model in benchmark.measured if model.name != ORACLE]
    columns = ["score", "mean of the oracles", "unit", "an oracle", *(model.label for model in models)]
    table = Table("Distance to the oracle", _caption(benchmark), columns)
    alone = benchmark.oracle_distances
    for key, found in benchmark.bands.items():
        cells = []
        for model in models:
            distances = estimate([found.distance(value) for value in model.found(key)], len(model.results))
            missing = [other for other in models if not other.found(key)]
            cells.append(distance_text(distances) if distances else absent(table, model, missing, key))
        beside = _range([distances[key] for distances in alone], table)
        unit = f"{found.spread:.2g}" if found.spread else f"0 {table.mark(NO_UNIT)}"
        table.rows.append([key, f"{found.center:.3f}", unit, beside, *cells])
    of_oracles = [benchmark.summary(distances) for distances in alone]
    of_models = [_summaries(benchmark, model) for model in models]
    for name in benchmark.summary(dict.fromkeys(benchmark.bands, 0.0)):
        cells = [_over_seeds(found, name, table) for found in of_models]
        table.rows.append([name, "", "", _range([found[name] for found in of_oracles], table), *cells])
    partial = [f"`{key}`" for key in benchmark.keys() if is_of_set(key) and key not in benchmark.bands]
    if partial:
        table.caption += f" Without {', '.join(partial)}, which not every oracle has."
    return note_failed(table, benchmark)


def _caption(benchmark: Benchmark) -> str:
    count = len(benchmark.oracle.results)
    caption = (
        f"(value - mean of the {count} oracles) / unit: 0 is the oracle, and below it counts as much as above it. The "
        "unit is the oracles' standard deviation over seeds, or what their rows say of it where that is more. So few "
        f"oracles may lie close together by chance, so that 1 is no limit: 95 % of true oracles or more are within "
        f"{cutoff(count):.1f}, in a single score and for a single seed, and {len(benchmark.bands) / 20:.1f} of "
        f"{len(benchmark.bands)} scores may be beyond by chance. "
    )
    if benchmark.oracle_distances:
        caption += (
            "An oracle: each against the others, median and range without sign; with one oracle fewer to compare "
            f"with, 95 % are within {cutoff(count - 1):.1f}. "
        )
    caption += (
        "Mean ± standard deviation over seeds. The last rows are without sign: the largest of all scores, the mean of "
        "each set's, and the mean of these"
    )
    several = sum(f"{name}/probability" in benchmark.bands for name in FORGET_SETS) > 1
    caption += "; the forms in which the forget set is asked are one set" if several else ""
    left_out = MODEL_UTILITY in benchmark.bands and MODEL_UTILITY not in benchmark.counted
    return caption + (", and model utility is in none." if left_out else ".")


def _range(distances: Sequence[float], table: Table) -> str:
    """Median and range without signs."""
    if not distances:
        return table.mark("An oracle is compared with the others if there are three at least.")
    middle, lowest, highest = spread_of([abs(distance) for distance in distances])
    return f"{middle:.1f} ({lowest:.1f} to {highest:.1f})"


def _summaries(benchmark: Benchmark, model: Model) -> list[dict[str, float]]:
    """Of each seed; empty if one of them lacks a score."""
    found = [benchmark.distances(values) for values in model.values]
    if any(key not in distances for distances in found for key in benchmark.counted):
        return []
    return [benchmark.summary(distances) for distances in found]


def _over_seeds(found: Sequence[Mapping[str, float]], name: str, table: Table) -> str:
    over = estimate([summary[name] for summary in found], len(found))
    if over is None:
        return table.mark("Not taken over the scores that are left where some are missing.")
    return distance_text(over, sign="")
