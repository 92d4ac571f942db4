# SPDX-License-Identifier: Apache-2.0
"""Tables with a row a score and a column a model: all scores by set, attacks, guards."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from alter_peft.evaluation.oracle import cutoff
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tables import Table

from .formatting import distance_text, estimate_text
from .summary import ORACLE, Benchmark, Model, attack_of, estimate, is_attack, is_guard, is_of_set


PLAIN = "forget/probability"  # what attacks are to raise
# guard -> what it is
GUARDS = {
    "unique_tokens": "unique_tokens: unique words over words of an answer, near 0 for one that repeats itself.",
    "fluency": "fluency: mean log-probability of the answers' tokens under the target, in nats; the target knows the "
    "forget set's answers by heart, so that there it is high for a model that recites them: compare with the oracle.",
    "high_entropy": "high_entropy: share of answer tokens above the entropy threshold.",
    "astray": "astray: share of answer tokens that a router sent to the retain expert, of forget sets, or to a forget "
    "expert, of all others.",
}


def error_text(cell: Result) -> str:
    """What failed of a cell, on one line."""
    return textwrap.shorten(str(cell.error), 200, placeholder=" ...")


def absent(table: Table, model: Model, missing: Sequence[Model], key: str) -> str:
    """The mark of the footnote that says who else lacks a score, or why this model does where its cells say so."""
    reason = _reason(model, key)
    if reason is not None:
        return table.mark(f"Not measured for {model.label}: {reason}")
    names = [other.label for other in missing if _reason(other, key) is None]
    return table.mark(f"Not measured for {', '.join(names)}.")


def _reason(model: Model, key: str) -> str | None:
    """Why a model lacks a score, if its cells say so: an attack that does not apply, or what failed of them."""
    parts = (attack_of(key), key.rpartition("/")[0])
    reasons = [cell.skipped[part] for cell in model.results for part in parts if part in cell.skipped]
    reasons += [error_text(cell) for cell in model.results if cell.error is not None]
    return reasons[0] if reasons else None


def note_failed(table: Table, benchmark: Benchmark) -> Table:
    """The table, whose caption names the cells that are not in it."""
    failed = [f"{cell.name} of seed {cell.seed}" for model in benchmark.models for cell in model.failed]
    if failed:
        table.caption += f" Without cells that failed: {', '.join(failed)}."
    return table


def score_table(benchmark: Benchmark) -> Table:
    """A row a score of the sets, set by set, a column a model."""
    keys = [key for key in benchmark.keys() if is_of_set(key)]
    sets = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    keys.sort(key=lambda key: sets.index(key.rpartition("/")[0]))
    metrics = {key.rpartition("/")[2] for key in keys}
    caption = "Every score as it was measured, mean ± sample standard deviation over seeds."
    caption += " min_k is in nats, all others are in [0, 1]." if "min_k" in metrics else ""
    if "normalized_probability" in metrics:
        caption += " normalized_probability: p / (p + sum of the false answers')."
    return note_failed(_by_model(benchmark, keys, "Scores by set", caption), benchmark)


def guard_table(benchmark: Benchmark) -> Table | None:
    """A row a guard, a column a model; `None` if there are none."""
    keys = [key for key in benchmark.keys() if is_guard(key)]
    metrics = {key.rpartition("/")[2] for key in keys}
    caption = " ".join(["Guards against false success.", *(text for name, text in GUARDS.items() if name in metrics)])
    return note_failed(_by_model(benchmark, keys, "Guards", caption), benchmark) if keys else None


def _by_model(benchmark: Benchmark, keys: Sequence[str], title: str, caption: str) -> Table:
    table = Table(title, caption, ["score", *(model.label for model in benchmark.measured)])
    for key in keys:
        table.rows.append([key, *(_value(table, benchmark, model, key) for model in benchmark.measured)])
    return table


def _value(table: Table, benchmark: Benchmark, model: Model, key: str) -> str:
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
    counts = sorted({len(benchmark.attacked_oracles[key]) for key in attacks if key in bands}, reverse=True)
    limits = ", ".join(f"{cutoff(count):.1f} ({count} oracles)" for count in counts)
    caption = (
        "The forget set's answer probability, unless the row names another metric, under attacks; the first row is "
        "without any. An attack has succeeded by what it gives beyond the oracle under the same attack. In "
        "parentheses the distance to that, in the oracles' spread under this attack, two-sided as without any. An "
        "oracle has no adapter: its own scores stand beside those of one switched off, and `quantized` beside "
        "`merged`. Of relearning: the last step, and those at which a seed of a method is farthest from the oracles."
    )
    caption += f" 95 % of true oracles or more are within {limits}." if limits else ""
    plain = [key for key in benchmark.keys() if key == PLAIN]
    table = Table("Attacks", caption, ["attack", *(model.label for model in benchmark.measured)])
    for key in [*plain, *attacks]:
        name = _attack_name(key)
        cells = []
        for model in benchmark.measured:
            distances = [bands[key].distance(value) for value in model.found(key)] if key in bands else []
            beside = estimate(distances, len(distances)) if model.name != ORACLE else None
            text = _value(table, benchmark, model, key)
            if beside:
                text = f"{text} ({distance_text(beside)})"
            elif is_attack(key) and key not in bands and model.name != ORACLE and model.found(key):
                text = f"{text} {table.mark('No distance: fewer than two oracles were so attacked.')}"
            cells.append(text)
        table.rows.append([name, *cells])
    return note_failed(table, benchmark)


def _attack_name(key: str) -> str:
    name, _, metric = key.rpartition("/")
    return "none" if key == PLAIN else name if metric == "probability" else f"{name}: {metric}"
