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
"""The trade that unlearning makes, as a table and as a picture: before, after, and an oracle that never saw it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .metrics import Pair, answer_rouge, score_answers


class Measured(NamedTuple):
    """One set of questions: mean answer probability, mean ROUGE-L recall, share of answer tokens routed astray."""

    probability: float
    rouge: float
    astray: float


def evaluate_sets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Pair]],
    forget_sets: Sequence[str],
    rouge_rows: int,
    desc: str,
) -> dict[str, Measured]:
    """
    Measure a model on every set.

    Where pairs carry false answers the probability is normalised, p / (p + sum of the false ones'), as TOFU has it.

    Args:
        sets: name -> questions.
        forget_sets: names of the sets that are to be forgotten.
        rouge_rows: about so many rows, spread over each set, are answered for ROUGE-L.
    """
    results = {}
    for name, pairs in sets.items():
        scores = score_answers(model, tokenizer, pairs, desc=f"{desc}: {name}")
        probability = scores.probability
        if pairs[0].wrong:
            false = [Pair(pair.prompt, answer) for pair in pairs for answer in pair.wrong]
            others = iter(score_answers(model, tokenizer, false).probability)
            totals = [sum(next(others) for _ in pair.wrong) for pair in pairs]
            probability = [p / (p + total) for p, total in zip(probability, totals, strict=True)]
        asked = pairs[:: max(1, len(pairs) // rouge_rows)]  # spread over the set
        rouge = answer_rouge(model, tokenizer, asked, desc=f"{desc}: {name}, answers")
        astray = scores.astray(name in forget_sets)
        results[name] = Measured(sum(probability) / len(probability), sum(rouge) / len(rouge), astray)
    return results


def format_table(results: Mapping[str, Mapping[str, Measured]], adapted: str) -> str:
    """A Markdown table: a row for each set, probability and ROUGE-L for each model, and routing of the adapted one."""
    models = list(results)
    header = ["set", *(f"P {m}" for m in models), *(f"ROUGE-L {m}" for m in models), "routed astray"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in results[models[0]]:
        cells = [results[m][name] for m in models]
        row = [name, *(f"{c.probability:.3f}" for c in cells), *(f"{c.rouge:.3f}" for c in cells)]
        lines.append("| " + " | ".join([*row, f"{results[adapted][name].astray:.3f}"]) + " |")
    return "\n".join(lines)


def write_results(results: Mapping[str, Mapping[str, Measured]], adapted: str, folder: Path, title: str) -> str:
    """Write results.json, table.md and trade.png to a folder, and return the table."""
    table = format_table(results, adapted)
    plain = {model: {name: m._asdict() for name, m in sets.items()} for model, sets in results.items()}
    (folder / "results.json").write_text(json.dumps(plain, indent=1))
    (folder / "table.md").write_text(table + "\n")
    plot_trade(results, folder / "trade.png", title)
    return table


def plot_trade(results: Mapping[str, Mapping[str, Measured]], path: Path, title: str) -> None:
    """Grouped bars of the answer probability of every set, one colour a model (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(next(iter(results.values())))
    figure, axes = plt.subplots(figsize=(1.4 * len(sets) + 2, 4))
    width = 0.8 / len(results)
    for i, (model, measured) in enumerate(results.items()):
        places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(sets))]
        bars = axes.bar(places, [measured[name].probability for name in sets], width, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("answer probability")
    axes.set_ylim(0, 1.08)
    axes.set_title(title)
    axes.legend(ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
