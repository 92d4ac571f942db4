# SPDX-License-Identifier: Apache-2.0
"""
Where the tokens to forget are to come to, beside where oracles have them: nothing is trained.

    python examples/studies/token_targets.py examples/people.yaml --data ../shared/data/tofu

The grid's target and oracles must be there (`alter-peft benchmark --config ... --methods`). A line is what a model
would be measured as whose tokens have come to their targets exactly: mean answer probability, exact memorisation,
extraction strength, PrivLeak against the oracles' mean AUC; and how the targets follow the oracles' log-probabilities
token by token: Spearman's correlation and mean distance in nats.

With `--unseen ../shared/data/tofu/holdout10.jsonl` a second table says how much of it is chance: the targets by other
unseen rows than the grid's own, so many at a time: in a row, as they stand in the file (TOFU has twenty on an author),
or spread over all of it. Rows left over are left out; each mean with the least and the most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from alter_peft.answer_end import EndOfAnswer
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.setting import read_setting
from alter_peft.evaluation.answers import encode_pair, labelled_row
from alter_peft.evaluation.metrics.membership import above_holdout, min_k
from alter_peft.evaluation.metrics.memorization import exact_memorization, extraction_strength
from alter_peft.evaluation.tables import Table, to_markdown
from alter_peft.losses import TokenScores
from alter_peft.retain_rows import retain_auto
from alter_peft.scoring import Row, ScoredModel
from alter_peft.trainer.damping import damped
from alter_peft.trainer.token_targets import Guide, token_targets
from alter_peft.trainer.token_traits import TextTraits, read_traits


SCORED = ("forget", "holdout")
MEASURES = ["P", "exact memorisation", "extraction strength", "PrivLeak"]
COLUMNS = ["targets", *MEASURES, "Spearman", "nats off"]
STRETCHES = (20, 40, 100, 200)  # so many unseen rows at a time


class Models(NamedTuple):
    """
    Scores of each set's labels by each model.

    sets: token ids and labels.
    content: of each row to forget and held out, how many labels are its own text.
    scores: by model and set.
    """

    sets: dict[str, list[Row]]
    content: dict[str, list[int]]
    scores: dict[tuple[str, str], list[TokenScores]]


def score(model: Any, rows: list[Row]) -> list[TokenScores]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return ScoredModel(model).label_scores(rows, 4, base=False, by_length=False)


def read(args: BenchmarkArguments, unseen: Path | None) -> Models:
    """
    All models of a grid on its sets, and on general text in the form of those to forget; the target alone on other
    unseen rows (`more`), none of which is in a set of the grid.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = read_setting(args, tokenizer).data
    parts = {"forget": data.forget, "unseen": data.calibration, "holdout": data.holdout, "retain": data.retain}
    pairs = {name: list(of) for name, of in parts.items()}
    is_text = pairs["forget"][0].is_text
    columns = ["completion"] if is_text else ["prompt", "completion"]
    like = {name: [getattr(pair, name) for pair in pairs["forget"]] for name in columns}
    general = retain_auto(Dataset.from_dict({"text": like["completion"]} if is_text else like))
    bare = pairs["forget"][0]._replace(given="", turns=())
    pairs["general"] = [
        bare._replace(prompt=row.get("prompt", ""), completion=row["text" if is_text else "completion"])
        for row in general
    ]
    if unseen is not None:
        asked = new_rows(unseen.read_text(encoding="utf-8"), {pair[:2] for of in pairs.values() for pair in of})
        pairs["more"] = [bare._replace(prompt=question, completion=answer) for question, answer in asked]
    sets = {name: [labelled_row(*encode_pair(tokenizer, pair)) for pair in of] for name, of in pairs.items()}
    end = EndOfAnswer(tokenizer)
    answers = {name: [[one for one in labels[1:] if one != -100] for _, labels in sets[name]] for name in SCORED}
    content = {name: [end.content_length(answer) for answer in rows] for name, rows in answers.items()}
    folder = Path(args.output_dir)
    models = {"target": folder / "target" / "model", "reference": args.model}
    models |= {path.name: path / "model" for path in sorted(folder.glob("oracle-*"))}
    scores: dict[tuple[str, str], list[TokenScores]] = {}
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        scored = sets if name == "target" else {part: rows for part, rows in sets.items() if part != "more"}
        scores |= {(name, part): score(model, rows) for part, rows in scored.items()}
        if name == "target":
            with damped([*ScoredModel(model).stack.layers]):
                scores["damped", "forget"] = score(model, sets["forget"])
    return Models(sets, content, scores)


def new_rows(lines: str, known: Collection[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Of JSON lines the questions and answers that are not known."""
    asked = [(row["question"], row["answer"]) for row in map(json.loads, lines.splitlines())]
    return [row for row in asked if row not in known]


def guides(models: Models, tokenizer: Any) -> dict[str, tuple[list[TokenScores], Guide]]:
    """What targets can be made of: the unseen rows, and what says which tokens give way."""
    sets, scores = models.sets, models.scores
    traits = {
        name: read_traits(sets["forget"], sets[name] if name else [], sets["retain"], tokenizer)
        for name in ("", "unseen", "general")
    }
    # features that are all alike foresee nothing
    ends_alone = TextTraits(*(one._replace(features=0 * one.features) for one in traits["unseen"]))
    unseen, general = scores["target", "unseen"], scores["target", "general"]
    itself, reference = scores["damped", "forget"], scores["reference", "forget"]
    theirs = {name: scores["reference", name] for name in ("unseen", "general")}
    return {
        "calibration rows, the guide alone": (unseen, Guide(itself, [], False)),
        "calibration rows, ends apart": (unseen, Guide(itself, [], False, traits=ends_alone)),
        "calibration rows": (unseen, Guide(itself, [], False, traits=traits["unseen"])),
        "calibration rows and a reference, the guide alone": (unseen, Guide(reference, theirs["unseen"], True)),
        "calibration rows and a reference":
            (unseen, Guide(reference, theirs["unseen"], True, traits=traits["unseen"])),
        "`forget_level=0.1`": ([], Guide(itself, [], False, traits=traits[""])),
        "general text": ([], Guide(itself, [], False, traits=traits["general"], general=general)),
        "a reference's own values": ([], Guide(reference, [], True, traits=traits[""])),
        "general text and a reference":
            ([], Guide(reference, theirs["general"], True, traits=traits["general"], general=general)),
    }  # fmt: skip


def auc(of_forget: Sequence[torch.Tensor], holdout: list[TokenScores], content: dict[str, list[int]]) -> float:
    never = min_k([row.log_prob for row in holdout], content["holdout"])
    return float(np.mean(above_holdout(min_k(of_forget, content["forget"]), never)))


class Measure(NamedTuple):
    """What a model is measured as whose tokens of the rows to forget have these values, against the oracles."""

    models: Models
    oracles: dict[str, list[torch.Tensor]]
    auc: float

    def of(self, values: Sequence[torch.Tensor], leads: Sequence[torch.Tensor], by: str = "target") -> list[float]:
        """The `MEASURES`; `by` is the model that the holdout is scored by."""
        content, first = self.models.content, [lead >= 0 for lead in leads]
        found = auc(values, self.models.scores[by, "holdout"], content)
        return [
            float(np.mean([float(row.mean().exp()) for row in values])),
            float(np.mean(exact_memorization(first, content["forget"]))),
            float(np.mean(extraction_strength(first, content["forget"]))),
            100 * (found - self.auc) / self.auc,
        ]

    def line(
        self, name: str, values: Sequence[torch.Tensor], leads: Sequence[torch.Tensor], by: str = "target"
    ) -> list[str]:
        *numbers, privacy = self.of(values, leads, by)
        flat, theirs = torch.cat([*values]).numpy(), [torch.cat(rows).numpy() for rows in self.oracles.values()]
        rank = np.mean([spearmanr(flat, one).statistic for one in theirs])
        off = np.mean([np.abs(flat - one).mean() for one in theirs])
        return [name, *(f"{value:.3g}" for value in numbers), f"{privacy:+.1f}", f"{rank:.2f}", f"{off:.2f}"]


def by_other_rows(measure: Measure, known: list[torch.Tensor], tokenizer: Any) -> list[list[str]]:
    """A line for so many unseen rows in a row, and one for as many spread over all: means, the least and the most."""
    sets, scores = measure.models.sets, measure.models.scores
    more, lines = len(sets["more"]), []
    for size in (*(size for size in STRETCHES if 2 * size <= more), more):
        times = more // size
        ways = {"in a row": [range(at * size, (at + 1) * size) for at in range(times)]}
        if times > 1:
            ways["spread"] = [range(more)[at::times][:size] for at in range(times)]
        for way, draws in ways.items():
            found = []
            for places in draws:
                unseen, rows = ([of[at] for at in places] for of in (scores["target", "more"], sets["more"]))
                traits = read_traits(sets["forget"], rows, sets["retain"], tokenizer)
                guide = Guide(scores["damped", "forget"], [], False, traits=traits)
                made = token_targets(known, unseen, guide, 0.1)
                found.append(measure.of(made.log_prob, made.lead))
            columns = [np.array(values) for values in zip(*found, strict=True)]
            spreads = [f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g})" for values in columns]
            lines.append([f"{size} rows {way}, {times} times", *spreads])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="Of the grid.")
    parser.add_argument("--output_dir", help="Of the grid, where it is not the config's.")
    parser.add_argument("--data", help="TOFU's files, where they are not taken from the Hub.")
    parser.add_argument(
        "--unseen", type=Path, help="More unseen rows in their order: JSON lines of `question` and `answer`."
    )
    given = parser.parse_args()
    own = {name: getattr(given, name) for name in ("output_dir", "data") if getattr(given, name) is not None}
    config = yaml.safe_load(given.config.read_text())
    if "data" not in config:
        own.pop("data", None)
    args = BenchmarkArguments(**{**config, "attacks": [], **own})
    models, tokenizer = read(args, given.unseen), AutoTokenizer.from_pretrained(args.model)
    scores, content = models.scores, models.content
    names = sorted({name for name, _ in scores if name.startswith("oracle")})
    oracles = {name: [row.log_prob for row in scores[name, "forget"]] for name in names}
    usual = np.mean([auc(rows, scores[name, "holdout"], content) for name, rows in oracles.items()])
    measure = Measure(models, oracles, float(usual))
    rows = []
    for name, of_forget in oracles.items():
        leads = [row.log_prob - row.log_rival for row in scores[name, "forget"]]
        rows.append(measure.line(name, of_forget, leads, by=name))
    known = [row.log_prob for row in scores["target", "forget"]]
    for name, (unseen, guide) in guides(models, tokenizer).items():
        made = token_targets(known, unseen, guide, 0.1)
        rows.append(measure.line(name, made.log_prob, made.lead))
    title = json.dumps(str(args.output_dir))
    print(to_markdown(Table(title, "", COLUMNS, rows)))
    if given.unseen is not None:
        print(to_markdown(Table(title, "", ["unseen rows", *MEASURES], by_other_rows(measure, known, tokenizer))))


if __name__ == "__main__":
    main()
