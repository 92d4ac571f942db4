# SPDX-License-Identifier: Apache-2.0
"""The trade that unlearning makes, as a table and as a picture: before, after, and an oracle that never saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.model_on_set import ModelOnSet, answer_together
from alter_peft.evaluation.scores import Score


# model -> "{set}/{metric}" -> score
Trade = Mapping[str, Mapping[str, Score]]
NORMALIZED = "normalized_probability"
BATCH_SIZE = 32  # of scores and of answers: sized for the small models and sets of the examples


def evaluate_sets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Pair]],
    forget_sets: Sequence[str],
    rouge_rows: int,
    routed: bool,
) -> dict[str, Score]:
    """
    Probability and ROUGE-L of every set, and of a routed model the share of its answer tokens sent astray.

    Where pairs carry false answers it is `normalized_probability`, p / (p + sum of the false ones'), as TOFU has it.

    Args:
        sets: name -> questions.
        forget_sets: names of the sets that are to be forgotten.
        rouge_rows: about so many rows, spread over each set, are answered for ROUGE-L.
        routed: whether the model has a gated adapter.
    """
    scores: dict[str, Score] = {}
    asked = [
        ModelOnSet(model, tokenizer, name, pairs, name in forget_sets, rouge_rows, batch_size=BATCH_SIZE)
        for name, pairs in sets.items()
    ]
    answer_together(asked, BATCH_SIZE)
    for one in asked:
        of_answer = NORMALIZED if any(pair.wrong for pair in one.pairs) else "probability"
        found = measure(one, [of_answer, "rouge", *(["astray"] if routed else [])])
        scores |= {str(score.key): score for score in found}
    return scores


def format_table(results: Trade, adapted: str) -> str:
    """
    A Markdown table: a row for each set, probability and ROUGE-L for each model, and routing of the adapted one.

    A set whose probability is normalised says so.
    """
    models = list(results)
    header = ["set", *(f"P {m}" for m in models), *(f"ROUGE-L {m}" for m in models), "routed astray"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in _sets(results):
        key = _probability(results, name)
        cells = [results[m][metric] for metric in (key, f"{name}/rouge") for m in models]
        cells.append(results[adapted][f"{name}/astray"])
        lines.append("| " + " | ".join([_label(key), *(f"{cell.value:.3f}" for cell in cells)]) + " |")
    return "\n".join(lines)


def _label(key: str) -> str:
    """The name of a set, and whether this is its normalised probability."""
    name, _, metric = key.rpartition("/")
    return f"{name} (normalised)" if metric == NORMALIZED else name


def _probability(results: Trade, name: str) -> str:
    """The key of a set's probability, which is normalised where the set has false answers."""
    normalized = f"{name}/{NORMALIZED}"
    return normalized if all(normalized in scores for scores in results.values()) else f"{name}/probability"


def _sets(results: Trade) -> list[str]:
    keys = next(iter(results.values()))
    return list(dict.fromkeys(key.rpartition("/")[0] for key in keys))


def write_results(results: Trade, adapted: str, folder: Path, title: str) -> str:
    """Write results.json, table.md and trade.png to a folder, and return the table."""
    table = format_table(results, adapted)
    plain = {model: {key: asdict(score) for key, score in scores.items()} for model, scores in results.items()}
    (folder / "results.json").write_text(json.dumps(plain, indent=1))
    (folder / "table.md").write_text(table + "\n")
    plot_trade(results, folder / "trade.png", title)
    return table


def plot_trade(results: Trade, path: Path, title: str) -> None:
    """Grouped bars of the answer probability of every set, one colour a model (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [_probability(results, name) for name in _sets(results)]
    figure, axes = plt.subplots(figsize=(1.4 * len(keys) + 2, 4))
    width = 0.8 / len(results)
    for i, (model, scores) in enumerate(results.items()):
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(keys))]
        bars = axes.bar(places, [scores[key].value for key in keys], width, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(keys)), list(map(_label, keys)))
    axes.set_ylabel("answer probability")
    axes.set_ylim(0, 1.08)
    axes.set_title(title)
    axes.legend(ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
