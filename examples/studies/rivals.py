# SPDX-License-Identifier: Apache-2.0
"""
What stands in the place of a forgotten token: how near others' choices are to an oracle's. Nothing is trained.

    python examples/studies/rivals.py examples/pilot.yaml --data ../shared/data/tofu

The grid's target and oracles must be there (`alter-peft benchmark --config ... --methods`). All is of the words of the
answers to forget, at most 40 rows, without the label itself: what the others share among them. *Off*: cross-entropy
from an oracle's shares to these, in nats, each token as much as the oracle has beside the label, the mean over the
oracles; *first*: of the tokens where the oracle's first choice is another than the label, how often it is theirs;
*spread*: the entropy of the shares. An oracle's line is its distance from the others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alter_peft.answer_end import EndOfAnswer
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.setting import read_setting
from alter_peft.evaluation.answers import encode_pair, labelled_row
from alter_peft.evaluation.tables import Table, to_markdown
from alter_peft.scoring import Row, ScoredModel
from alter_peft.trainer.damping import damped
from alter_peft.trainer.rivals import COUNT


ROWS = 40
COLUMNS = ["by", "off", "first", "spread"]
TEMPERATURES = (1.0, 1.25, 1.5, 1.75, 2.0)


def shares(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """ln of what all but the label share, (n, V)."""
    return (logits / temperature).scatter(-1, labels.unsqueeze(-1), -1e9).log_softmax(dim=-1)


def among(found: Tensor, count: int) -> Tensor:
    """The most likely ones alone, which then share it all."""
    top = found.topk(count, dim=-1)
    return torch.full_like(found, -1e9).scatter(-1, top.indices, top.values.log_softmax(dim=-1))


class Sums:
    """Of one line, over tokens and oracles."""

    def __init__(self) -> None:
        self.weight = self.off = self.others = self.first = self.spread = 0.0

    def add(self, own: Tensor, oracle: Tensor, labels: Tensor) -> None:
        """
        Args:
            own: ln of shares, (n, V).
            oracle: logits of all tokens, (n, V).
        """
        beside = 1 - oracle.softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        wanted, first = shares(oracle, labels).exp(), oracle.argmax(dim=-1)
        is_other = first != labels
        self.weight += float(beside.sum())
        self.off += float((beside * -(wanted * own).sum(dim=-1)).sum())
        self.spread += float((beside * -(own.exp() * own).sum(dim=-1)).sum())
        self.others += float(is_other.sum())
        self.first += float((own.argmax(dim=-1) == first)[is_other].sum())

    def line(self, name: str, is_cut: bool = False) -> list[str]:
        off = "-" if is_cut else f"{self.off / self.weight:.2f}"  # what is left out would have an infinite one
        return [name, off, f"{self.first / self.others:.2f}", f"{self.spread / self.weight:.2f}"]


def logits_of(model: Any, row: Row, count: int) -> tuple[Tensor, Tensor]:
    """Of the row's own words: logits (n, V) and labels (n,)."""
    ids, labels = torch.tensor([row[0]]), torch.tensor(row[1][1:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[0, :-1]
    return logits[labels != -100][:count].float(), labels[labels != -100][:count]


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
    tokenizer, folder = AutoTokenizer.from_pretrained(args.model), Path(args.output_dir)
    pairs = list(read_setting(args, tokenizer).data.forget)[:ROWS]
    rows = [labelled_row(*encode_pair(tokenizer, pair)) for pair in pairs]

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    target, reference = load(folder / "target" / "model"), load(args.model)
    oracles = {path.name: load(path / "model") for path in sorted(folder.glob("oracle-*"))}
    layers, end = [*ScoredModel(target).stack.layers], EndOfAnswer(tokenizer)
    found: dict[str, Sums] = {}

    def add(name: str, own: Tensor, others: dict[str, Tensor], labels: Tensor) -> None:
        for oracle in others.values():
            found.setdefault(name, Sums()).add(own, oracle, labels)

    for row in rows:
        count = end.content_length([label for label in row[1][1:] if label != -100])
        look: Callable[[Any], Tensor] = lambda model, row=row, count=count: logits_of(model, row, count)[0]  # noqa: E731
        base, labels = logits_of(target, row, count)
        with damped(layers):
            less = look(target)
        theirs = {name: look(oracle) for name, oracle in oracles.items()}
        add("the target", shares(base, labels), theirs, labels)
        for temperature in TEMPERATURES:
            name = f"the target with damped layers, temperature {temperature:g}"
            add(name, shares(less, labels, temperature), theirs, labels)
        add(f"the same at 1.5, {COUNT} tokens", among(shares(less, labels, 1.5), COUNT), theirs, labels)
        both = [shares(one, labels, 1.5) for one in (base, less)]
        add("target and damped, both at 1.5", torch.logaddexp(*both) - math.log(2), theirs, labels)
        add("the model before", shares(look(reference), labels), theirs, labels)
        for name, logits in theirs.items():
            add(
                "an oracle",
                shares(logits, labels),
                {other: theirs[other] for other in theirs if other != name},
                labels,
            )
    lines = [sums.line(name, name.endswith("tokens")) for name, sums in found.items()]
    print(to_markdown(Table(json.dumps(str(args.output_dir)), "", COLUMNS, lines)))


if __name__ == "__main__":
    main()
