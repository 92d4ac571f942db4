# SPDX-License-Identifier: Apache-2.0
"""What a fold of the demo's adapter into plain LoRA loses, and what switching off or deleting one expert brings back.

    python examples/fold.py [folder of the demo, runs/demo by default]

Needs the `target/` and `adapter/` that `make demo` wrote there; writes nothing.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from demo import read
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alter_peft.evaluation import Pair, score_answers
from alter_peft.tuner import AlterLayer
from alter_peft.tuner.export import export_to_lora


FOLDS = {
    "folded, omega = 1 for all": (1.0, 1.0, 1.0),
    "folded, forget experts alone": (1.0, 1.0, 1.0),
    "folded, retain expert alone": (0.0, 0.0, 0.0),
}


def probabilities(model, tokenizer, sets: dict[str, list[Pair]]) -> list[float]:
    """Mean answer probability of every set, normalised by the false answers where there are any."""
    means = []
    for pairs in sets.values():
        found = score_answers(model, tokenizer, pairs).probability
        if pairs[0].wrong:
            false = [Pair(pair.prompt, answer) for pair in pairs for answer in pair.wrong]
            others = iter(score_answers(model, tokenizer, false).probability)
            found = [p / (p + sum(next(others) for _ in pair.wrong)) for p, pair in zip(found, pairs, strict=True)]
        means.append(sum(found) / len(found))
    return means


def folded(model: PeftModel, target: Path, weights: tuple[float, ...], with_retain: bool) -> PeftModel:
    """The adapter at fixed weights, as stock PEFT loads it."""
    if not with_retain:
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, AlterLayer):
                torch.nn.init.zeros_(module.alter_B["default"].retain)
    with tempfile.TemporaryDirectory() as folder:
        export_to_lora(model, folder, expert_weights=weights)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), folder)


def show(title: str, sets: dict[str, list[Pair]], rows: dict[str, list[float]]) -> None:
    print(f"\n| {' | '.join([title, *sets])} |\n{'|---' * (len(sets) + 1)}|")
    for name, values in rows.items():
        print(f"| {' | '.join([name, *(f'{value:.3f}' for value in values)])} |", flush=True)


def folds(folder: Path) -> None:
    """The adapter gated, and folded into plain LoRA in three ways."""
    target, tokenizer = folder / "target", AutoTokenizer.from_pretrained(folder / "adapter")
    sets = {
        name: [Pair(r["prompt"], r["completion"], tuple(r.get("wrong", ()))) for r in read(name)]
        for name in ("forget", "retain", "neighbours", "world")
    }
    base = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    found = {"before unlearning": probabilities(base, tokenizer, sets)}
    model = PeftModel.from_pretrained(base, folder / "adapter")
    found["gated adapter"] = probabilities(model, tokenizer, sets)
    for name, weights in FOLDS.items():
        lora = folded(model, target, weights, with_retain="forget experts alone" not in name)
        found[name] = probabilities(lora, tokenizer, sets)
    show("answer probability", sets, found)


def single_experts(folder: Path) -> None:
    """What is forgotten of each domain with one expert switched off, and with it deleted."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    domains, rows = list(model.list_experts()), read("forget")
    sets = {d: [Pair(row["prompt"], row["completion"]) for row in rows if row["domain"] == d] for d in domains}
    found = {"all experts on": probabilities(model, tokenizer, sets)}
    for domain in domains:
        with model.experts({domain: 0.0}):
            found[f"{domain} off"] = probabilities(model, tokenizer, sets)
    for domain in domains:
        rest = copy.deepcopy(model)
        rest.delete_expert(domain)
        found[f"{domain} deleted"] = probabilities(rest, tokenizer, sets)
    show("answer probability", sets, found)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    folds(folder)
    single_experts(folder)


if __name__ == "__main__":
    main()
