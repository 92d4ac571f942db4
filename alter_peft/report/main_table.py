# SPDX-License-Identifier: Apache-2.0
"""The first table of a report: a row a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alter_peft.evaluation.metrics.truth_ratio import ForgetQuality
from alter_peft.evaluation.oracle import (
    AUC,
    RATIOS,
    SIMILARITIES,
    null_ratio_tests,
    others,
    privacy_leak,
    ratio_tests,
    similarity_gap,
    spread_of,
)
from alter_peft.evaluation.results import ORACLE, Result
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tables import Table
from alter_peft.evaluation.tasks.tofu import MODEL_UTILITY

from .estimates import estimate, estimate_text, part_text
from .score_tables import absent, error_text
from .summary import Benchmark, Model, known_metrics


class Cell(NamedTuple):
    """What stands in a cell, and a footnote to it."""

    text: str
    note: str | None = None


class Column(NamedTuple):
    """A column of the main table: what stands there in the row of a model, if it was measured, and what it means."""

    name: str
    find: Callable[[Model, Benchmark], Cell | None]
    meaning: str = ""


def _plain(name: str, key: Key, short: str = "") -> Column:
    """
    A score as it was measured.

    Args:
        short: of the metric, as the caption calls it; without that it has no meaning there.
    """

    def find(model: Model, _: Benchmark) -> Cell | None:
        found = model.estimate(key)
        return None if found is None else Cell(estimate_text(found))

    return Column(name, find, f"{short}: {known_metrics()[key.metric].caption}." if short else "")


def _tests(model: Model, benchmark: Benchmark) -> list[ForgetQuality]:
    """Of each seed against each oracle; of the oracle itself, of each pair."""
    own, of_oracles = (
        [scores[RATIOS].rows for scores in one.scores if RATIOS in scores] for one in (model, benchmark.oracle)
    )
    return null_ratio_tests(of_oracles) if model.name == ORACLE else ratio_tests(own, of_oracles)


def _with_ratios(model: Model) -> str:
    return part_text(sum(RATIOS in scores for scores in model.scores), len(model.results))


def _ks(model: Model, benchmark: Benchmark) -> Cell | None:
    found = [test.statistic for test in _tests(model, benchmark)]
    if not found:
        return None
    middle, lowest, highest = spread_of(found)
    spread = f" ({lowest:.2f} to {highest:.2f})" if len(found) > 1 else ""
    return Cell(f"{middle:.2f}{spread}{_with_ratios(model)}")


def _p_value(model: Model, benchmark: Benchmark) -> Cell | None:
    """The median: a mean of p-values means nothing."""
    found = [test.pvalue for test in _tests(model, benchmark)]
    return Cell(f"{spread_of(found).median:.2g}{_with_ratios(model)}") if found else None


def _privleak(model: Model, benchmark: Benchmark) -> Cell | None:
    """Of each seed against the oracles; of an oracle, against the others."""
    levels, own = benchmark.oracle.found(AUC), model.found(AUC)
    if not own or len(levels) < 2:
        return None
    is_oracle = model.name == ORACLE
    try:
        found = [privacy_leak(auc, others(levels, i) if is_oracle else levels) for i, auc in enumerate(own)]
    except ValueError as error:  # the AUC of the oracles is 0
        return Cell("", f"PrivLeak has no value. {error}")
    leaks = estimate(found, len(model.results))
    return None if leaks is None else Cell(estimate_text(leaks, 1, "+"))


def _gap(model: Model, benchmark: Benchmark) -> Cell | None:
    """Of each seed against the oracles; of an oracle, against the others."""
    own, of_oracles = (
        [scores for scores in one.scores if set(SIMILARITIES) <= scores.keys()] for one in (model, benchmark.oracle)
    )
    is_oracle = model.name == ORACLE
    if len(of_oracles) < 2:
        return None
    found = [similarity_gap(one, others(of_oracles, i) if is_oracle else of_oracles) for i, one in enumerate(own)]
    gaps = estimate(found, len(model.results))
    return None if gaps is None else Cell(estimate_text(gaps))


def _utility(model: Model, benchmark: Benchmark) -> Cell | None:
    """With the scores that make it 0, where it is."""
    found = model.estimate(MODEL_UTILITY)
    if found is None:
        return None
    names = ", ".join(f"`{key}`" for key in model.zero_parts)
    why = f"Model utility is 0 where one of its nine scores is. Of {model.label}: {names}."
    return Cell(estimate_text(found), why if names else None)


def _seconds(model: Model, benchmark: Benchmark) -> Cell | None:
    found = estimate(
        [cell.seconds["training"] for cell in model.results if "training" in cell.seconds], len(model.results)
    )
    return None if found is None else Cell(estimate_text(found, 0))


COLUMNS = [
    _plain("forget P", Key("forget", "probability"), "P"),
    _plain("paraphrased P", Key("paraphrased", "probability"), "P"),
    _plain("VerbMem", Key("forget", "verbmem"), "VerbMem"),
    _plain("KnowMem", Key("forget", "knowmem"), "KnowMem"),
    _plain("ROUGE-L", Key("forget", "rouge"), "ROUGE-L"),
    _plain("ROUGE-L F", Key("forget", "rouge_f"), "ROUGE-L F"),
    _plain("BLEU", Key("forget", "bleu"), "BLEU"),
    Column("similarity gap", _gap, f"Similarity gap: {known_metrics()['similarity_gap'].caption}."),
    _plain("truth ratio", RATIOS, "Truth ratio"),
    _plain("ES", Key("forget", "extraction_strength"), "ES"),
    _plain("EM", Key("forget", "exact_memorization"), "EM"),
    Column(
        "KS",
        _ks,
        "KS: two-sample statistic of the forget set's truth ratios against each oracle's, median and range; the "
        "oracle's own row has that of its pairs, which is what another seed alone makes.",
    ),
    Column(
        "p of KS",
        _p_value,
        "p of KS: median. A high p-value proves nothing: all models answer the same questions, and then it is near 1 "
        "much sooner than between independent samples; read it beside the oracle's own.",
    ),
    Column(
        "PrivLeak",
        _privleak,
        f"PrivLeak: {known_metrics()['privleak'].caption}, in percent, 0 for the oracle; the oracle's own row has "
        "each against the others.",
    ),
    _plain("retain P", Key("retain", "probability"), "P"),
    Column("utility", _utility, f"Utility: {known_metrics()['model_utility'].caption}."),
    _plain("retain VerbMem", Key("retain", "verbmem"), "VerbMem"),
    _plain("retain KnowMem", Key("retain", "knowmem"), "KnowMem"),
]
SECONDS = Column("seconds", _seconds, "Seconds: of the training.")
ACCURACY = "acc"
CAPTION = "Mean ± sample standard deviation over seeds."


def main_table(benchmark: Benchmark) -> Table:
    """
    A row a model, target and oracle first, and one for each cell that failed.

    Columns are those of `COLUMNS` that some model has, and the accuracy of each multiple-choice task; where it has
    none of them, every score of the sets.
    """
    models = benchmark.measured
    tasks = [key for key in benchmark.keys if key == Key(key.set, ACCURACY)]
    columns = [*COLUMNS, *(_plain(f"{key.set} {ACCURACY}", key, ACCURACY) for key in tasks)]
    columns = [column for column in columns if any(column.find(model, benchmark) for model in models)]
    if not columns:
        columns = [_plain(str(key), key) for key in benchmark.bands]
    columns += [SECONDS] if any(SECONDS.find(model, benchmark) for model in models) else []
    caption = " ".join(dict.fromkeys([CAPTION, *(column.meaning for column in columns if column.meaning)]))
    table = Table("Forgetting and utility", caption, ["model", *(column.name for column in columns)])
    for model in benchmark.models:
        if model.results:
            table.rows.append([model.label, *(_shown(table, model, column, benchmark) for column in columns)])
        partly = [cell for cell in model.results if cell.error is not None]
        table.rows += [_failed(cell, "failed in part") for cell in partly]
        table.rows += [_failed(cell, "failed") for cell in model.failed]
    return table


def _failed(cell: Result, how: str) -> list[str]:
    return [f"{cell.name}, seed {cell.seed}", f"{how}: {error_text(cell)}"]


def _shown(table: Table, model: Model, column: Column, benchmark: Benchmark) -> str:
    cell = column.find(model, benchmark)
    if cell is None:
        return absent(table, model, [one for one in benchmark.measured if column.find(one, benchmark) is None])
    return cell.text if cell.note is None else f"{cell.text} {table.mark(cell.note)}".strip()
