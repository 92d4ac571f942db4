# SPDX-License-Identifier: Apache-2.0
"""The trade that unlearning makes, as a table and as a picture: before, after, and an oracle that never saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.model_on_set import ModelOnSet, answer_together
from alter_peft.evaluation.scores import Key, Score, Scores
from alter_peft.evaluation.tables import Table, to_markdown

from .drawing import new_axes, save


Trade = Mapping[str, Scores]  # by model
NORMALIZED = "normalized_probability"
BESIDE = {"rouge": "ROUGE-L", "exact_memorization": "exact"}  # what is measured beside it -> its name in the table
BATCH_SIZE = 32  # of scores and of answers: sized for the small models and sets of the examples


def evaluate_sets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Pair]],
    forget_sets: Sequence[str],
    rouge_rows: int,
    routed: bool,
) -> Scores:
    """
    Probability, ROUGE-L and exact memorisation of every set, and of a routed model the answer tokens sent astray.

    Where pairs carry false answers it is `normalized_probability`, p / (p + sum of the false ones'), as TOFU has it.

    Args:
        rouge_rows: so many rows, spread over each set, are answered for ROUGE-L.
        routed: whether the model has a gated adapter.
    """
    asked = [
        ModelOnSet(model, tokenizer, name, pairs, name in forget_sets, rouge_rows, batch_size=BATCH_SIZE)
        for name, pairs in sets.items()
    ]
    answer_together(asked, BATCH_SIZE)
    scores = Scores()
    for one in asked:
        of_answer = NORMALIZED if any(pair.wrong for pair in one.pairs) else "probability"
        scores.add(measure(one, [of_answer, *BESIDE, *(["astray"] if routed else [])]))
    return scores


def format_table(results: Trade, adapted: str) -> str:
    """
    A Markdown table: a row for each set, and for each model its probability, ROUGE-L and exact memorisation; of the
    adapted one its routing.

    A set whose probability is normalised says so.
    """
    header = [f"{name} {model}" for name in ("P", *BESIDE.values()) for model in results]
    table = Table("", "", ["set", *header, "routed astray"])
    for label, key in _probabilities(results).items():
        columns = (key, *(Key(key.set, metric) for metric in BESIDE))
        cells = [scores[column] for column in columns for scores in results.values()]
        cells.append(results[adapted][Key(key.set, "astray")])
        table.rows.append([label, *(f"{cell.value:.3f}" for cell in cells)])
    return to_markdown(table)


def _probabilities(results: Trade) -> dict[str, Key]:
    """What a set is called, and its probability, which is normalised where the set has false answers."""
    scores: Sequence[Score] = list(next(iter(results.values())).values())
    return {
        f"{one.set} (normalised)" if one.metric == NORMALIZED else one.set: one.key
        for one in scores
        if one.metric in (NORMALIZED, "probability")
    }


def write_results(results: Trade, adapted: str, folder: Path, title: str) -> str:
    """Write results.json, table.md and trade.png to a folder, and return the table."""
    table = format_table(results, adapted)
    rows = {model: scores.to_list() for model, scores in results.items()}
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    (folder / "table.md").write_text(table + "\n")
    plot_trade(results, folder / "trade.png", title)
    return table


def plot_trade(results: Trade, path: Path, title: str) -> None:
    """Grouped bars of the answer probability of every set, one colour a model (PNG)."""
    keys = _probabilities(results)
    axes = new_axes(1.4 * len(keys) + 2, 4)
    axes.grid(visible=False)
    width = 0.8 / len(results)
    for i, (model, scores) in enumerate(results.items()):
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(keys))]
        bars = axes.bar(places, [scores[key].value for key in keys.values()], width, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(keys)), list(keys))
    axes.set_ylabel("answer probability")
    axes.set_ylim(0, 1.08)
    axes.set_title(title)
    axes.legend(ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    save(axes, path)
