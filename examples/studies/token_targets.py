# SPDX-License-Identifier: Apache-2.0
"""
Where the tokens to forget are to come to, beside where oracles have them: nothing is trained.

    python examples/studies/token_targets.py examples/people.yaml --data ../shared/data/tofu

The grid's target and oracles must be there (`alter-peft benchmark --config ... --methods`). A line is what a model
would be measured as whose tokens have come to their targets exactly: mean answer probability, exact memorisation,
extraction strength, PrivLeak against the oracles' mean AUC; and how the targets follow the oracles' log-probabilities
token by token: Spearman's correlation and mean distance in nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
COLUMNS = ["targets", "P", "exact memorisation", "extraction strength", "PrivLeak", "Spearman", "nats off"]


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


def read(args: BenchmarkArguments) -> Models:
    """All models of a grid on its sets; of those to forget, general text in their form as well."""
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
        scores |= {(name, part): score(model, rows) for part, rows in sets.items()}
        if name == "target":
            with damped([*ScoredModel(model).stack.layers]):
                scores["damped", "forget"] = score(model, sets["forget"])
    return Models(sets, content, scores)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="Of the grid.")
    parser.add_argument("--output_dir", help="Of the grid, where it is not the config's.")
    parser.add_argument("--data", help="TOFU's files, where they are not taken from the Hub.")
    given = parser.parse_args()
    own = {name: value for name, value in vars(given).items() if name != "config" and value is not None}
    config = yaml.safe_load(given.config.read_text())
    if "data" not in config:
        own.pop("data", None)
    args = BenchmarkArguments(**{**config, "attacks": [], **own})
    models = read(args)
    scores, content = models.scores, models.content
    oracles = sorted({name for name, _ in scores if name.startswith("oracle")})
    theirs = [[row.log_prob for row in scores[name, "forget"]] for name in oracles]
    usual = float(np.mean([
        auc(rows, scores[name, "holdout"], content) for name, rows in zip(oracles, theirs, strict=True)
    ]))  # fmt: skip

    def line(name: str, values: Sequence[torch.Tensor], leads: Sequence[torch.Tensor], found: float) -> list[str]:
        first = [lead >= 0 for lead in leads]
        flat, of_oracles = torch.cat([*values]).numpy(), [torch.cat(rows).numpy() for rows in theirs]
        numbers = [
            np.mean([float(row.mean().exp()) for row in values]),
            np.mean(exact_memorization(first, content["forget"])),
            np.mean(extraction_strength(first, content["forget"])),
        ]
        rank = np.mean([spearmanr(flat, one).statistic for one in of_oracles])
        off = np.mean([np.abs(flat - one).mean() for one in of_oracles])
        privacy = 100 * (found - usual) / usual
        return [name, *(f"{value:.3g}" for value in numbers), f"{privacy:+.1f}", f"{rank:.2f}", f"{off:.2f}"]

    rows = []
    for name, of_forget in zip(oracles, theirs, strict=True):
        leads = [row.log_prob - row.log_rival for row in scores[name, "forget"]]
        rows.append(line(name, of_forget, leads, auc(of_forget, scores[name, "holdout"], content)))
    known = [row.log_prob for row in scores["target", "forget"]]
    for name, (unseen, guide) in guides(models, AutoTokenizer.from_pretrained(args.model)).items():
        made = token_targets(known, unseen, guide, 0.1)
        found = auc(made.log_prob, scores["target", "holdout"], content)
        rows.append(line(name, made.log_prob, made.lead, found))
    print(to_markdown(Table(json.dumps(str(args.output_dir)), "", COLUMNS, rows)))


if __name__ == "__main__":
    main()
