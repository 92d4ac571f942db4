# SPDX-License-Identifier: Apache-2.0
"""The first table of a report: a row a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import NamedTuple, TypeVar

from alter_peft.evaluation.metrics.membership import privleak
from alter_peft.evaluation.metrics.truth_ratio import ForgetQuality, forget_quality
from alter_peft.evaluation.oracle import (
    AUC,
    RATIOS,
    SIMILARITIES,
    others,
    similarity_gap,
    spread_of,
)
from alter_peft.evaluation.results import ORACLE, Result
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tables import Table
from alter_peft.evaluation.tasks.tofu import MODEL_UTILITY

from .balance import Balance
from .estimates import distance_text, estimate, estimate_text, part_text
from .score_tables import NOT_TAKEN, TOO_FEW, absent, error_text
from .summary import MEAN, Benchmark, Model, known_metrics


T = TypeVar("T")


class Shown(NamedTuple):
    """What stands in a cell, and a footnote to it."""

    text: str
    note: str | None = None


class Column(NamedTuple):
    """A column of the main table: what stands there in the row of a model, if it was measured, and what it means."""

    name: str
    find: Callable[[Model, Benchmark], Shown | None]
    meaning: str = ""


def _plain(name: str, key: Key, short: str = "") -> Column:
    """
    A score as it was measured.

    Args:
        short: of the metric, as the caption calls it; without that it has no meaning there.
    """

    meaning = f"{short}: {known_metrics()[key.metric].caption}." if short else ""
    return Column(name, lambda model, _: _estimated(model, model.found(key)), meaning)


def _estimated(model: Model, found: Sequence[float], digits: int = 3, sign: str = "") -> Shown | None:
    """What was found of the seeds of a model, as `estimate_text` has it; `None` if nothing was."""
    over = estimate(found, len(model.results))
    return None if over is None else Shown(estimate_text(over, digits, sign))


def _levels(of_oracles: Sequence[T], model: Model, place: int) -> Sequence[T]:
    """What a seed is compared with: all oracles, or of an oracle the others."""
    return others(of_oracles, place) if model.name == ORACLE else of_oracles


def _tests(model: Model, benchmark: Benchmark) -> list[ForgetQuality]:
    """Of each seed against each oracle; of the oracle itself, of each pair."""
    own, of_oracles = (
        [scores[RATIOS].rows for scores in one.scores if RATIOS in scores] for one in (model, benchmark.oracle)
    )
    pairs = combinations(of_oracles, 2) if model.name == ORACLE else product(own, of_oracles)
    return [forget_quality(*pair) for pair in pairs]


def _with_ratios(model: Model) -> str:
    return part_text(sum(RATIOS in scores for scores in model.scores), len(model.results))


def _ks(model: Model, benchmark: Benchmark) -> Shown | None:
    found = [test.statistic for test in _tests(model, benchmark)]
    if not found:
        return None
    return Shown((spread_of(found).text(".2f") if len(found) > 1 else f"{found[0]:.2f}") + _with_ratios(model))


def _p_value(model: Model, benchmark: Benchmark) -> Shown | None:
    """The median: a mean of p-values means nothing."""
    found = [test.pvalue for test in _tests(model, benchmark)]
    return Shown(f"{spread_of(found).median:.2g}{_with_ratios(model)}") if found else None


def _privleak(model: Model, benchmark: Benchmark) -> Shown | None:
    levels = benchmark.oracle.found(AUC)
    if len(levels) < 2:
        return None
    try:
        found = [privleak(auc, _levels(levels, model, i)) for i, auc in enumerate(model.found(AUC))]
    except ValueError as error:  # the AUC of the oracles is 0
        return Shown("", f"PrivLeak has no value. {error}")
    return _estimated(model, found, 1, "+")


def _gap(model: Model, benchmark: Benchmark) -> Shown | None:
    own, of_oracles = (
        [scores for scores in one.scores if set(SIMILARITIES) <= scores.keys()] for one in (model, benchmark.oracle)
    )
    if len(of_oracles) < 2:
        return None
    return _estimated(model, [similarity_gap(one, _levels(of_oracles, model, i)) for i, one in enumerate(own)])


def _utility(model: Model, benchmark: Benchmark) -> Shown | None:
    """With the scores that make it 0, where it is."""
    found, names = _estimated(model, model.found(MODEL_UTILITY)), ", ".join(f"`{key}`" for key in model.zero_parts)
    why = f"Model utility is 0 where one of its nine scores is. Of {model.label}: {names}."
    return found._replace(note=why) if found and names else found


def _distance(model: Model, benchmark: Benchmark) -> Shown | None:
    found = [summary[MEAN] for summary in benchmark.summaries(model)]
    if (over := estimate(found, len(model.results))) is not None:
        return Shown(distance_text(over, sign=""))
    return Shown("", TOO_FEW if model.name == ORACLE and len(model.results) < 3 else NOT_TAKEN)


def _balanced(
    name: str, of: Callable[[Balance, Mapping[Key, float]], float | None], meaning: str = "", sign: str = ""
) -> Column:
    """A number that is made of a seed's scores, beside those of target and oracles."""

    def find(model: Model, benchmark: Benchmark) -> Shown | None:
        balance = Balance(benchmark)
        found = [value for values in model.values if (value := of(balance, values)) is not None]
        return _estimated(model, found, 3, sign)

    return Column(name, find, meaning)


def _seconds(model: Model, benchmark: Benchmark) -> Shown | None:
    found = [cell.seconds["training"] for cell in model.results if "training" in cell.seconds]
    return _estimated(model, found, 0)


COLUMNS = [
    Column("mean distance", _distance, "Mean distance: to the oracles, over the sets, in units of their spread."),
    _balanced(
        "forgetting",
        Balance.forgetting,
        "Forgetting: harmonic mean over P, paraphrased P, ROUGE-L, EM and ES of how close they are, "
        "max(0, 1 - |value - oracles| / |target - oracles|).",
    ),
    _balanced(
        "harmonic mean", Balance.both, "Harmonic mean: of forgetting and of utility over the target's, 1 at most."
    ),
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
    _plain("bystanders P", Key("bystanders", "probability"), "P"),
    _plain("bystanders EM", Key("bystanders", "exact_memorization"), "EM"),
    _plain("bystanders astray", Key("bystanders", "astray"), "Astray"),
    _balanced(
        "kept better", Balance.kept_better, "Kept better: the largest rise of a kept set's P above the target's.", "+"
    ),
    _plain("retain VerbMem", Key("retain", "verbmem"), "VerbMem"),
    _plain("retain KnowMem", Key("retain", "knowmem"), "KnowMem"),
]
SECONDS = Column("seconds", _seconds, "Seconds: of the training.")
MADE = ("mean distance", "forgetting", "harmonic mean", "kept better")  # of other scores, whatever these are
ACCURACY = "acc"


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
    if all(column.name in MADE for column in columns):
        columns += [_plain(str(key), key) for key in benchmark.bands]
    columns += [SECONDS] if any(SECONDS.find(model, benchmark) for model in models) else []
    meanings = dict.fromkeys(column.meaning for column in columns if column.meaning)
    caption = " ".join(["Mean ± sample standard deviation over seeds.", *meanings])
    table = Table("Forgetting and utility", caption, ["model", *(column.name for column in columns)])
    for model in benchmark.models:
        if model.results:
            table.rows.append([model.label, *(_shown(table, model, column, benchmark) for column in columns)])
        table.rows += [_failed(cell, "failed in part") for cell in model.results if cell.error is not None]
        table.rows += [_failed(cell, "failed") for cell in model.failed]
    return table


def _failed(cell: Result, how: str) -> list[str]:
    return [f"{cell.name}, seed {cell.seed}", f"{how}: {error_text(cell)}"]


def _shown(table: Table, model: Model, column: Column, benchmark: Benchmark) -> str:
    cell = column.find(model, benchmark)
    if cell is None:
        return absent(table, model, [one for one in benchmark.measured if column.find(one, benchmark) is None])
    return cell.text if cell.note is None else f"{cell.text} {table.mark(cell.note)}".strip()
