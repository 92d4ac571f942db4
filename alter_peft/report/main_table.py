# SPDX-License-Identifier: Apache-2.0
"""The first table of a report: a row a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alter_peft.evaluation.metrics.truth_ratio import ForgetQuality
from alter_peft.evaluation.oracle import (
    RATIOS,
    SIMILARITIES,
    null_ratio_tests,
    others,
    privacy_leak,
    ratio_tests,
    similarity_gap,
    spread_of,
)
from alter_peft.evaluation.tables import Table

from .formatting import estimate_text, part_text
from .model_tables import absent, error_text
from .summary import AUC, MODEL_UTILITY, ORACLE, Benchmark, Model, estimate


class Cell(NamedTuple):
    """What stands in a cell, and a footnote to it."""

    text: str
    note: str | None = None


class Column(NamedTuple):
    """A column of the main table: what stands there in the row of a model, if it was measured, and what it means."""

    name: str
    find: Callable[[Model, Benchmark], Cell | None]
    meaning: str = ""


def _plain(name: str, key: str, meaning: str = "", digits: int = 3) -> Column:
    def find(model: Model, _: Benchmark) -> Cell | None:
        found = model.estimate(key)
        return None if found is None else Cell(estimate_text(found, digits))

    return Column(name, find, meaning)


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


P = "P: mean probability of the true answers."
VERBMEM = "VerbMem: ROUGE-L of the first tokens of a passage's continuation."
KNOWMEM = "KnowMem: ROUGE-L of short answers to questions about a book."
COLUMNS = [
    _plain("forget P", "forget/probability", P),
    _plain("paraphrased P", "paraphrased/probability", P),
    _plain("VerbMem", "forget/verbmem", VERBMEM),
    _plain("KnowMem", "forget/knowmem", KNOWMEM),
    _plain("ROUGE-L", "forget/rouge", "ROUGE-L: of what the model says in full about the forget set."),
    _plain("BLEU", "forget/bleu", "BLEU: BLEU-4 of the same."),
    Column("similarity gap", _gap, "Similarity gap: mean over ROUGE-L and BLEU of |model - oracles|."),
    _plain(
        "truth ratio",
        "forget/truth_ratio",
        "Truth ratio: probability of the false answers over the true one's, or the inverse where that is smaller.",
    ),
    _plain("ES", "forget/extraction_strength", "ES: extraction strength of the forget set."),
    _plain("EM", "forget/exact_memorization", "EM: exact memorisation of the forget set."),
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
        "PrivLeak: 0 is the oracle, in percent; the oracle's own row has each against the others.",
    ),
    _plain("retain P", "retain/probability", P),
    Column("utility", _utility, "Utility: model utility, the harmonic mean of TOFU's nine scores."),
    _plain("retain VerbMem", "retain/verbmem", VERBMEM),
    _plain("retain KnowMem", "retain/knowmem", KNOWMEM),
]
SECONDS = _plain("seconds", "seconds/training", "Seconds: of the training.", digits=0)
ACCURACY, ACC = "/acc", "acc: accuracy of multiple choice."
CAPTION = "Mean ± sample standard deviation over seeds."


def main_table(benchmark: Benchmark) -> Table:
    """
    A row a model, target and oracle first, and one for each cell that failed.

    Columns are those of `COLUMNS` that some model has, and the accuracy of each multiple-choice task; where it has
    none of them, every score of the sets.
    """
    models = benchmark.measured
    tasks = [key for key in benchmark.keys() if key.endswith(ACCURACY)]
    columns = [*COLUMNS, *(_plain(f"{key.removesuffix(ACCURACY)} acc", key, ACC) for key in tasks)]
    columns = [column for column in columns if any(column.find(model, benchmark) for model in models)]
    if not columns:
        columns = [_plain(key, key) for key in benchmark.bands]
    columns += [SECONDS] if any(SECONDS.find(model, benchmark) for model in models) else []
    caption = " ".join(dict.fromkeys([CAPTION, *(column.meaning for column in columns if column.meaning)]))
    table = Table("Forgetting and utility", caption, ["model", *(column.name for column in columns)])
    for model in benchmark.models:
        if model.results:
            table.rows.append([model.label, *(_shown(table, model, column, benchmark) for column in columns)])
        partly = [cell for cell in model.results if cell.error is not None]
        table.rows += [[f"{cell.name}, seed {cell.seed}", f"failed in part: {error_text(cell)}"] for cell in partly]
        table.rows += [[f"{cell.name}, seed {cell.seed}", f"failed: {error_text(cell)}"] for cell in model.failed]
    return table


def _shown(table: Table, model: Model, column: Column, benchmark: Benchmark) -> str:
    cell = column.find(model, benchmark)
    if cell is None:
        missing = [other for other in benchmark.measured if column.find(other, benchmark) is None]
        return absent(table, model, missing, column.name)
    return cell.text if cell.note is None else f"{cell.text} {table.mark(cell.note)}".strip()
