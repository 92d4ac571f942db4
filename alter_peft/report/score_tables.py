# SPDX-License-Identifier: Apache-2.0
"""Tables with a row a score and a column a model: distances to the oracle, all scores by set, attacks, guards."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from alter_peft.evaluation.metrics import METRICS, is_guard
from alter_peft.evaluation.oracle import cutoff, spread_of
from alter_peft.evaluation.results import ORACLE, Result
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tables import Table
from alter_peft.evaluation.tasks.tofu import FORGET_SETS, MODEL_UTILITY

from .estimates import distance_text, estimate, estimate_text
from .summary import Benchmark, Model, is_of_set, known_metrics


PLAIN = Key("forget", "probability")  # what attacks are to raise
NOT_TAKEN = "Not taken over the scores that are left where some are missing."
TOO_FEW = "An oracle is compared with the others if there are three at least."
NO_UNIT = "The oracles agree exactly on this score, of which there are no rows: no unit."


def error_text(cell: Result) -> str:
    """What failed of a cell, on one line."""
    return textwrap.shorten(str(cell.error), 200, placeholder=" ...")


def absent(table: Table, model: Model, missing: Sequence[Model], key: Key | None = None) -> str:
    """
    The mark of the footnote that says who else lacks a score, or why this model does where its cells say so.

    Args:
        missing: the models that lack it.
        key: of the score; `None` of what is made of several.
    """
    reason = _reason(model, key)
    if reason is not None:
        return table.mark(f"Not measured for {model.label}: {reason}")
    names = [other.label for other in missing if _reason(other, key) is None]
    return table.mark(f"Not measured for {', '.join(names)}.")


def _reason(model: Model, key: Key | None) -> str | None:
    """Why a model lacks a score, if its cells say so: an attack that does not apply, or what failed of them."""
    parts = () if key is None or key.attack is None else (key.attack, f"{key.attack}/{key.set}")
    reasons = [cell.skipped[part] for cell in model.results for part in parts if part in cell.skipped]
    reasons += [error_text(cell) for cell in model.results if cell.error is not None]
    return reasons[0] if reasons else None


def note_failed(table: Table, benchmark: Benchmark) -> Table:
    """The table, whose caption names the cells that are not in it."""
    failed = [f"{cell.name} of seed {cell.seed}" for model in benchmark.models for cell in model.failed]
    if failed:
        table.caption += f" Without cells that failed: {', '.join(failed)}."
    return table


def metric_captions(keys: Iterable[Key]) -> str:
    """What the metrics of some scores are, and their units."""
    wanted = {key.metric for key in keys}
    found = {name: metric for name, metric in known_metrics().items() if name in wanted}
    units = {name: f", in {metric.unit}" if metric.unit else "" for name, metric in found.items()}
    return " ".join(f"{name}: {metric.caption}{units[name]}." for name, metric in found.items())


def score_table(benchmark: Benchmark) -> Table:
    """A row a score of the sets, set by set, a column a model."""
    keys = [key for key in benchmark.keys if is_of_set(key)]
    sets = [key.set for key in keys]
    keys.sort(key=lambda key: sets.index(key.set))
    caption = "Every score as it was measured, mean ± sample standard deviation over seeds. "
    return note_failed(_by_model(benchmark, keys, "Scores by set", caption + metric_captions(keys)), benchmark)


def guard_table(benchmark: Benchmark) -> Table | None:
    """A row a guard, a column a model; `None` if there are none."""
    keys = [key for key in benchmark.keys if key.attack is None and key.step is None]
    keys = [key for key in keys if key.metric in METRICS and is_guard(key.metric)]
    caption = f"Guards against false success. {metric_captions(keys)}"
    if any(key.metric == "fluency" for key in keys):
        caption += (
            " The judge of fluency is the target, which knows the forget set's answers by heart, so that there it is "
            "high for a model that recites them: compare with the oracle."
        )
    return note_failed(_by_model(benchmark, keys, "Guards", caption), benchmark) if keys else None


def _by_model(benchmark: Benchmark, keys: Sequence[Key], title: str, caption: str) -> Table:
    table = Table(title, caption, ["score", *(model.label for model in benchmark.measured)])
    for key in keys:
        table.rows.append([str(key), *(_value(table, benchmark, model, key) for model in benchmark.measured)])
    return table


def _value(table: Table, benchmark: Benchmark, model: Model, key: Key) -> str:
    found = model.estimate(key)
    if found is None:
        return absent(table, model, [other for other in benchmark.measured if other.estimate(key) is None], key)
    return estimate_text(found)


def attack_table(benchmark: Benchmark) -> Table | None:
    """A row an attack, a column a model: each score, and its distance to the oracle; `None` if no attack was made."""
    attacks = benchmark.attacks
    if not attacks:
        return None
    bands = {**benchmark.bands, **benchmark.attack_bands}
    plain = [key for key in benchmark.keys if key == PLAIN]
    table = Table("Attacks", _attack_caption(benchmark), ["attack", *(model.label for model in benchmark.measured)])
    for key in [*plain, *attacks]:
        cells = []
        for model in benchmark.measured:
            distances = [bands[key].distance(value) for value in model.found(key)] if key in bands else []
            beside = estimate(distances, len(distances)) if model.name != ORACLE else None
            text = _value(table, benchmark, model, key)
            if beside:
                text = f"{text} ({distance_text(beside)})"
            elif key.attack is not None and key not in bands and model.name != ORACLE and model.found(key):
                text = f"{text} {table.mark('No distance: fewer than two oracles were so attacked.')}"
            cells.append(text)
        table.rows.append([_attack_name(key), *cells])
    return note_failed(table, benchmark)


def _attack_name(key: Key) -> str:
    if key == PLAIN:
        return "none"
    name = str(key._replace(metric=""))
    return name if key.metric == PLAIN.metric else f"{name}: {key.metric}"


def _attack_caption(benchmark: Benchmark) -> str:
    shown = [key for key in benchmark.attacks if key in benchmark.attack_bands]
    counts = {len(benchmark.attacked_oracles[key]) for key in shown}
    limits = ", ".join(f"{cutoff(count):.1f} ({count} oracles)" for count in sorted(counts, reverse=True))
    return (
        "The forget set's answer probability, unless the row names another metric, under attacks; the first row is "
        "without any. An attack has succeeded by what it gives beyond the oracle under the same attack. In "
        "parentheses the distance to that, in the oracles' spread under this attack, two-sided as without any. An "
        "oracle has no adapter: its own scores stand beside those of one switched off, and `quantization` beside "
        "`merged_quantization`. Of relearning: the last step, and those at which a seed of a method is farthest from "
        "the oracles."
    ) + (f" 95 % of true oracles or more are within {limits}." if limits else "")


def distance_table(benchmark: Benchmark) -> Table:
    """A row a score: the oracles' mean and unit, each oracle against the others, each model; then the summaries."""
    models = [model for model in benchmark.measured if model.name != ORACLE]
    columns = ["score", "mean of the oracles", "unit", "an oracle", *(model.label for model in models)]
    table = Table("Distance to the oracle", _distance_caption(benchmark), columns)
    alone = benchmark.oracle_distances
    for key, found in benchmark.bands.items():
        cells = []
        for model in models:
            distances = estimate([found.distance(value) for value in model.found(key)], len(model.results))
            missing = [other for other in models if not other.found(key)]
            cells.append(distance_text(distances) if distances else absent(table, model, missing, key))
        beside = _range([distances[key] for distances in alone], table)
        unit = f"{found.spread:.2g}" if found.spread else f"0 {table.mark(NO_UNIT)}"
        table.rows.append([str(key), f"{found.center:.3f}", unit, beside, *cells])
    of_oracles = benchmark.summaries(benchmark.oracle)
    of_models = [benchmark.summaries(model) for model in models]
    for name in benchmark.summary(dict.fromkeys(benchmark.bands, 0.0)):
        over = [estimate([summary[name] for summary in found], len(found)) for found in of_models]
        cells = [table.mark(NOT_TAKEN) if one is None else distance_text(one, sign="") for one in over]
        table.rows.append([name, "", "", _range([found[name] for found in of_oracles], table), *cells])
    partial = [f"`{key}`" for key in benchmark.keys if is_of_set(key) and key not in benchmark.bands]
    if partial:
        table.caption += f" Without {', '.join(partial)}, which not every oracle has."
    return note_failed(table, benchmark)


def _distance_caption(benchmark: Benchmark) -> str:
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
    several = sum(Key(name, "probability") in benchmark.bands for name in FORGET_SETS) > 1
    caption += "; the forms in which the forget set is asked are one set" if several else ""
    left_out = MODEL_UTILITY in benchmark.bands and MODEL_UTILITY not in benchmark.counted
    return caption + (", and model utility is in none." if left_out else ".")


def _range(distances: Sequence[float], table: Table) -> str:
    """Median and range without signs."""
    if not distances:
        return table.mark(TOO_FEW)
    return spread_of([abs(distance) for distance in distances]).text(".1f")
