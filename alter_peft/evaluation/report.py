# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a benchmark found: four tables, the figures, a Markdown file and one HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from .beside_oracles import privacy_leaks, similarity_gaps, truth_ratio_tests
from .figures import Figure, write_figures
from .page import page
from .results import Result
from .summary import (
    ORACLE,
    RATIOS,
    Benchmark,
    Estimate,
    Model,
    estimate,
    is_attack,
    is_guard,
    is_of_set,
)
from .tables import Table, to_markdown


class Column(NamedTuple):
    """A column of the main table, and what stands there in the row of a model; `None` if that was not measured."""

    name: str
    find: Callable[[Model, Benchmark], str | None]


def _plain(name: str, key: str, digits: int = 3) -> Column:
    return Column(name, lambda model, _: _text(model.estimate(key), digits))


def _text(found: Estimate | None, digits: int = 3, sign: str = "") -> str | None:
    """`0.051`, `0.051 ± 0.010` for several seeds, and how many of them where some lack the score."""
    if found is None:
        return None
    text = f"{found.mean:{sign}.{digits}f}"
    if found.spread is not None:
        text += f" ± {found.spread:.{digits}f}"
    return text + _part(found.measured, found.cells)


def _part(measured: int, cells: int) -> str:
    return "" if measured == cells else f" ({measured} of {cells} seeds)"


def _ks(model: Model, benchmark: Benchmark) -> str | None:
    found = [test.statistic for test in truth_ratio_tests(model, benchmark.oracle)]
    if not found:
        return None
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{median(found):.2f}{spread}{_with_truth_ratios(model)}"


def _p_value(model: Model, benchmark: Benchmark) -> str | None:
    """The median: a mean of p-values means nothing."""
    found = [test.pvalue for test in truth_ratio_tests(model, benchmark.oracle)]
    return f"{median(found):.2g}{_with_truth_ratios(model)}" if found else None


def _with_truth_ratios(model: Model) -> str:
    return _part(sum(RATIOS in result.scores for result in model.results), len(model.results))


def _privleak(model: Model, benchmark: Benchmark) -> str | None:
    found = privacy_leaks(model, benchmark.oracle)
    return _text(estimate(found, len(found), len(model.results)), 1, "+")


def _gap(model: Model, benchmark: Benchmark) -> str | None:
    found = similarity_gaps(model, benchmark.oracle)
    return _text(estimate(found, len(found), len(model.results)))


COLUMNS = [
    _plain("forget P", "forget/probability"),
    _plain("paraphrased P", "paraphrased/probability"),
    _plain("VerbMem", "forget/verbmem"),
    _plain("KnowMem", "forget/knowmem"),
    _plain("ROUGE-L", "forget/rouge"),
    _plain("BLEU", "forget/bleu"),
    Column("similarity gap", _gap),
    _plain("truth ratio", "forget/truth_ratio"),
    _plain("ES", "forget/extraction_strength"),
    _plain("EM", "forget/exact_memorization"),
    Column("KS", _ks),
    Column("p of KS", _p_value),
    Column("PrivLeak", _privleak),
    _plain("utility", "utility/model_utility"),
    _plain("retain VerbMem", "retain/verbmem"),
    _plain("retain KnowMem", "retain/knowmem"),
]
SECONDS = _plain("seconds", "seconds/training", 0)


def main_table(benchmark: Benchmark) -> Table:
    """
    A row a model, target and oracle first, and one for each cell that failed.

    Columns are those of `COLUMNS` that some model has; where it has none of them, every score of the sets.
    """
    caption = (
        "Mean ± sample standard deviation over seeds. P: answer probability; ES: extraction strength; EM: exact "
        "memorisation, all on the forget set. KS: two-sample statistic of the forget set's truth ratios against each "
        "oracle's, median and range; the oracle's own row has that of its pairs, which is what another seed alone "
        "makes. Its p-value (median) is uniform if nothing differs, so a high one proves nothing. PrivLeak: 0 is the "
        "oracle, in percent. Seconds: of the training."
    )
    models = benchmark.measured
    columns = [column for column in COLUMNS if any(column.find(model, benchmark) for model in models)]
    if not columns:
        columns = [_plain(key, key) for key in benchmark.bands]
    columns += [SECONDS] if any(SECONDS.find(model, benchmark) for model in models) else []
    table = Table("Forgetting and utility", caption, ["model", *(column.name for column in columns)])
    for model in benchmark.models:
        if model.results:
            cells = []
            for column in columns:
                missing = [other for other in models if column.find(other, benchmark) is None]
                cells.append(column.find(model, benchmark) or _absent(table, model, missing, column.name))
            table.rows.append([model.label, *cells])
        stopped = [cell for cell in model.results if cell.error is not None]
        table.rows += [[f"{cell.name}, seed {cell.seed}", f"stopped: {_error(cell)}"] for cell in stopped]
        table.rows += [[f"{cell.name}, seed {cell.seed}", f"failed: {_error(cell)}"] for cell in model.failed]
    return table


def _error(cell: Result) -> str:
    return textwrap.shorten(str(cell.error), 200, placeholder=" ...")


def _absent(table: Table, model: Model, missing: Sequence[Model], key: str) -> str:
    """The mark of the footnote that says who else lacks a score, or why this model does where its cells say so."""
    reason = _reason(model, key)
    if reason is not None:
        return table.mark(f"Not measured for {model.label}: {reason}")
    names = [other.label for other in missing if _reason(other, key) is None]
    return table.mark(f"Not measured for {', '.join(names)}.")


def _note_failed(table: Table, benchmark: Benchmark) -> Table:
    failed = [f"{cell.name} of seed {cell.seed}" for model in benchmark.models for cell in model.failed]
    if failed:
        table.mark(f"Without cells that failed: {', '.join(failed)}.")
    return table


def distance_table(benchmark: Benchmark) -> Table:
    """A row a score, a column a model: two-sided distances to the oracle, then the largest and the mean."""
    count = len(benchmark.oracle.results)
    caption = (
        f"(value - mean of the {count} oracles) / their standard deviation: 0 is the oracle, and below it counts as "
        "much as above it. Mean ± standard deviation over seeds; the last rows are over all scores and seeds. With so "
        "few oracles the unit itself is uncertain: distances of one or two are no difference."
    )
    models = [model for model in benchmark.measured if model.name != ORACLE]
    columns = ["score", "oracle", *(model.label for model in models)]
    table = Table("Distance to the oracle", caption, columns)
    alike = []
    for key, found in benchmark.bands.items():
        cells = []
        for model in models:
            distances = [found.distance(values[key]) for values in model.values if key in values]
            text = _text(estimate(distances, len(distances), len(model.results)), 1, "+")
            missing = [other for other in models if other.estimate(key) is None]
            cells.append(text or _absent(table, model, missing, key))
        if not found.spread:
            alike.append(f"`{key}`")
        table.rows.append([key, f"{found.center:.3f} ± {found.spread:.3f}", *cells])
    table.rows.append(["largest", "", *(_over_scores(benchmark, model, table, max) for model in models)])
    table.rows.append(["mean", "", *(_over_scores(benchmark, model, table, mean) for model in models)])
    if alike:
        table.mark(f"The oracles agree exactly on {', '.join(alike)}: no unit; left out of the last two rows.")
    partial = [key for key in benchmark.keys() if is_of_set(key) and key not in benchmark.bands]
    if partial:
        names = ", ".join(f"`{key}`" for key in partial)
        table.mark(f"Without {names}, which not every oracle has.")
    return _note_failed(table, benchmark)


def _over_scores(
    benchmark: Benchmark, model: Model, table: Table, function: Callable[[Sequence[float]], float]
) -> str:
    """The absolute distances of all scores with a unit and of all seeds, as one number; empty if some are missing."""
    with_unit = [key for key, found in benchmark.bands.items() if found.spread]
    if any(key not in values for key in with_unit for values in model.values):
        return table.mark("Not taken over the scores that are left where some are missing.")
    distances = [benchmark.distances(values) for values in model.values]
    return f"{function([abs(found[key]) for found in distances for key in with_unit]):.1f}"


def attack_table(benchmark: Benchmark) -> Table | None:
    """A row an attack, a column a model; `None` if no attack was made."""
    keys = [key for key in benchmark.keys() if is_attack(key)]
    caption = (
        "The forget set's answer probability, unless the row names another metric, under attacks; the first row is "
        "without any. An attack has succeeded by what it gives beyond the oracle under the same attack."
    )
    plain = [key for key in benchmark.keys() if key == "forget/probability"]
    table = _by_model(benchmark, [*plain, *keys], "Attacks", caption)
    for row in table.rows:
        name, _, metric = row[0].rpartition("/")
        row[0] = "none" if name == "forget" else name if metric == "probability" else f"{name}: {metric}"
    table.columns[0] = "attack"
    return _note_failed(table, benchmark) if keys else None


def guard_table(benchmark: Benchmark) -> Table | None:
    """A row a guard, a column a model; `None` if there are none."""
    keys = [key for key in benchmark.keys() if is_guard(key)]
    caption = (
        "Guards against false success. unique_tokens: unique words over words of an answer, near 0 for one that "
        "repeats itself. fluency: mean log-probability of the answers' tokens under the base model, in nats. "
        "high_entropy: share of answer tokens above the entropy threshold. astray: share of answer tokens that a "
        "router sent to the retain expert, of forget sets, or to a forget expert, of all others."
    )
    table = _by_model(benchmark, keys, "Guards", caption)
    return _note_failed(table, benchmark) if keys else None


def _by_model(benchmark: Benchmark, keys: Sequence[str], title: str, caption: str) -> Table:
    models = benchmark.measured
    table = Table(title, caption, ["score", *(model.label for model in models)])
    for key in keys:
        missing = [model for model in models if model.estimate(key) is None]
        cells = [_text(model.estimate(key)) or _absent(table, model, missing, key) for model in models]
        table.rows.append([key, *cells])
    return table


def _reason(model: Model, key: str) -> str | None:
    """Why a model lacks a score, if its cells say so: an attack that does not apply, or what stopped them."""
    attack = key.partition("/")[0]
    reasons = [why for cell in model.results for name, why in cell.skipped.items() if name.startswith(attack)]
    reasons += [_error(cell) for cell in model.results if cell.error is not None]
    return reasons[0] if reasons else None


def report_tables(benchmark: Benchmark) -> list[Table]:
    """The main table first, distances, and attacks and guards where there are any."""
    found = [main_table(benchmark), distance_table(benchmark), attack_table(benchmark), guard_table(benchmark)]
    return [table for table in found if table is not None]


def write_report(benchmark: Benchmark, found: Sequence[Table], folder: Path, command: str) -> None:
    """
    Write report.md, report.html and the figures (PNG) to a folder.

    Args:
        found: what `report_tables` makes of the benchmark.
        command: what makes the report, for its reader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_figures(benchmark, folder)
    (folder / "report.md").write_text(_markdown(benchmark, found, figures, command), encoding="utf-8")
    (folder / "report.html").write_text(page(benchmark, found, figures, command), encoding="utf-8")


def _markdown(benchmark: Benchmark, found: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    parts = [f"# Benchmark {benchmark.folder.resolve().name}", f"Made by `{command}`."]
    for table in found:
        parts += [f"## {table.title}", table.caption, to_markdown(table)]
    for figure in figures:
        parts += [f"## {figure.title}", figure.caption, f"![{figure.title}]({figure.path.name})"]
    return "\n\n".join(parts) + "\n"
