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
"""One model, with or without an adapter, on sets of one's own, TOFU, multiple choice and under attack."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .answers import Pair
from .attacks import ATTACKS, Rows, attack
from .choices import evaluate_choices
from .measure import METRICS, Asked, Score, measure
from .methods import load
from .oracle import Distance, distances
from .results import Result
from .tables import Table
from .tofu import TofuData, evaluate_tofu, read_tofu


@dataclass
class EvaluateArguments:
    """
    What is measured of a model. At least one of `sets`, `tofu` and `tasks`.

    model, adapter: folders or Hub ids; the adapter of any PEFT type, or none.
    output_file: the scores, row by row, as JSON (see `Result`).
    sets: `name=file.jsonl`, rows of `prompt` and `completion`, and for some metrics `wrong`, a list of false answers,
        and `rephrased`, the true one in other words.
    forget: the names of the sets that are to be forgotten.
    metrics: names of `METRICS`, of each set.
    tofu, split, retain_rows, rows: arguments of `read_tofu`; its metrics are TOFU's own.
    tasks, limit, form: arguments of `evaluate_choices`.
    attacks: names of `ATTACKS`, on the forget sets of `sets`, or on TOFU's. A set named `holdout` holds rows like them
        that were never trained on, which some attacks need.
    oracles: results of models that never saw the forget set, made by this command or by a benchmark: two at least.
    """

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    output_file: str = field(metadata={"help": "The scores as JSON."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of an adapter of any PEFT type."})
    sets: list[str] = field(default_factory=list, metadata={"help": "name=file.jsonl: rows of prompt, completion."})
    forget: list[str] = field(default_factory=list, metadata={"help": "Names of the sets that are to be forgotten."})
    metrics: list[str] = field(
        default_factory=lambda: ["probability", "rouge"], metadata={"help": f"Of each set: {', '.join(METRICS)}."}
    )
    tofu: str | None = field(default=None, metadata={"help": "Folder of TOFU's JSON lines, or a Hub data set."})
    split: str = field(default="forget01", metadata={"help": "Of TOFU: forget01, forget05 or forget10."})
    retain_rows: int | None = field(default=None, metadata={"help": "Of TOFU: retain rows that the model was taught."})
    rows: int | None = field(default=None, metadata={"help": "Of TOFU: questions asked of each other set."})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Multiple choice: tasks of lm-evaluation-harness, or files."}
    )
    limit: int | None = field(default=None, metadata={"help": "Questions of each task, at most."})
    form: str = field(default="letters", metadata={"help": "How a file's questions are asked: letters or texts."})
    attacks: list[str] = field(default_factory=list, metadata={"help": f"Some of {', '.join(ATTACKS)}."})
    oracles: list[str] = field(default_factory=list, metadata={"help": "Results of models that never saw it."})
    answered: int | None = field(default=None, metadata={"help": "Questions answered in full (default: all)."})
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens of an answer."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a batch."})
    bf16: bool = field(default=True, metadata={"help": "Measure under bfloat16 autocast."})

    def __post_init__(self) -> None:
        if not (self.sets or self.tofu or self.tasks):
            raise ValueError("`sets`, `tofu` and `tasks` are all unset. Give at least one of them to measure.")
        for name, known in (("metrics", METRICS), ("attacks", ATTACKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"`{name}` has {unknown}, but must be some of {list(known)}.")
        odd = [entry for entry in self.sets if not all(entry.partition("="))]
        if odd:
            raise ValueError(f"`sets` has {odd[0]!r}, but must be entries name=file.jsonl.")
        names = [entry.partition("=")[0] for entry in self.sets]
        if unknown := sorted(set(self.forget) - set(names)):
            raise ValueError(f"`forget` has {unknown}, but the `sets` are {names}.")
        if self.attacks and not (self.forget or self.tofu):
            raise ValueError("`attacks` is set, but no set is to be forgotten. Name one by `forget`, or set `tofu`.")
        if len(self.oracles) == 1:
            raise ValueError("`oracles` has one result, but needs two at least: their spread is the unit of distance.")


def read_set(path: str) -> list[Pair]:
    """
    Questions and answers of a file of JSON lines.

    Raises:
        ValueError: no such file, a line that is no JSON object, or one without `prompt` or `completion`.
    """
    if not Path(path).is_file():
        raise ValueError(f"`sets` names {path!r}, but there is no such file.")
    pairs = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            pairs.append(Pair(row["prompt"], row["completion"], tuple(row.get("wrong", ())), row.get("rephrased")))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"`sets` names {path!r}, whose line {number} has no `prompt` and `completion` ({error!r})."
            ) from error
    if not pairs:
        raise ValueError(f"`sets` names {path!r}, which has no rows.")
    return pairs


class Evaluation:
    """What `EvaluateArguments` ask for; the files are read at once, so that faults show before any model is loaded."""

    def __init__(self, args: EvaluateArguments) -> None:
        self.args = args
        self.sets = {name: read_set(path) for name, _, path in (entry.partition("=") for entry in args.sets)}
        self.tofu: TofuData | None = (
            read_tofu(args.tofu, args.split, args.retain_rows, args.rows) if args.tofu else None
        )
        clash = sorted(set(self.sets) & set(self.tofu.sets)) if self.tofu else []
        if clash:
            raise ValueError(f"`sets` has {clash}, which are names of TOFU's sets. Choose others.")
        self.oracles = [Result.load(Path(path)) for path in args.oracles]

    def run(self) -> Result:
        """Measure, and write the result."""
        args, start = self.args, time.monotonic()
        model: Any = load(args.model)
        if args.adapter is not None:
            model = PeftModel.from_pretrained(model, args.adapter).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        result = Result(Path(args.adapter or args.model).name, 0, settings=asdict(args))
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=args.bf16):
            result.scores = self._scores(model, tokenizer)
            if args.attacks:
                attacked = attack(model, tokenizer, self._rows(), args.attacks)
                result.scores |= attacked.scores
                result.curves, result.skipped = attacked.curves, attacked.skipped
        result.seconds["evaluation"] = time.monotonic() - start
        result.save(Path(args.output_file))
        return result

    def _scores(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Score]:
        args = self.args
        scores: dict[str, Score] = {}
        for name, pairs in self.sets.items():
            options = (name in args.forget, args.answered, args.max_new_tokens, args.batch_size)
            scores |= measure(Asked(model, tokenizer, name, pairs, *options), args.metrics)
        if self.tofu is not None:
            scores |= evaluate_tofu(model, tokenizer, self.tofu, args.answered, args.max_new_tokens, args.batch_size)
        if args.tasks:
            scores |= evaluate_choices(model, tokenizer, args.tasks, args.limit, args.batch_size, args.form)
        return scores

    def _rows(self) -> Rows:
        if self.args.forget:
            forget = [pair for name in self.args.forget for pair in self.sets[name]]
            known = [name for name in self.sets if name not in (*self.args.forget, "holdout")]
            retain = [pair for name in known for pair in self.sets[name]]
            return Rows(forget, retain, self.sets.get("holdout", []), (), self.args.answered)
        assert self.tofu is not None
        data = self.tofu
        return Rows(data.forget, data.retain, data.holdout, data.sets["paraphrased"], self.args.answered)

    def table(self, result: Result) -> Table:
        """A row for each score, and with oracles their band and the distance."""
        found: dict[str, Distance] = {}
        if self.oracles:
            shared = [key for key in result.scores if all(key in oracle.scores for oracle in self.oracles)]
            own = {key: result.scores[key] for key in shared}
            found = distances(own, [{key: oracle.scores[key] for key in shared} for oracle in self.oracles])
        columns = ["score", "value", *(["oracles", "distance"] if found else [])]
        rows = []
        for key, score in result.scores.items():
            beside = found.get(key)
            cells = [key, f"{score.value:.3f}"]
            if beside is not None:
                cells += [f"{beside.band.center:.3f} ± {beside.band.spread:.3f}", f"{beside.distance:+.1f}"]
            rows.append(cells)
        return Table("Scores", "", columns, rows)
