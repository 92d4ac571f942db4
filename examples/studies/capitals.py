# SPDX-License-Identifier: Apache-2.0
"""
Whether a forgotten fact comes back in other words: every capital that the demo's model knows, three at a time.

    python examples/studies/capitals.py --forget_loss soft_targets

SmolLM2-135M-Instruct forgets three capitals as in `alter-peft demo`, all others are retained, and the four that the
demo shows as not mentioned are asked as well; then it begins anew with the next three. An answer "says" a capital if
its name stands in the 20 tokens that the model says by itself, in any case of letters. About a minute for three.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.demo import smollm2
from alter_peft.demo.facts import FORGET, OTHERS, RETAIN, UNSEEN, rows
from alter_peft.evaluation import Pair
from alter_peft.evaluation.answers import generate_answers


CAPITALS = {**FORGET, **RETAIN}
GROUP = 3


def answers(model: Any, tokenizer: Any, capitals: Mapping[str, str]) -> dict[str, str]:
    """What the model says by itself of each country."""
    pairs = [Pair(row["prompt"], row["completion"]) for row in rows(capitals)]
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        found = generate_answers(model, tokenizer, pairs, max_new_tokens=20)
    return dict(zip(capitals, (" ".join(one.split()) for one in found), strict=True))


def says(capitals: Mapping[str, str], answer: Mapping[str, str]) -> int:
    return sum(capital.lower() in answer[country].lower() for country, capital in capitals.items())


def trained(model: Any, tokenizer: Any, forget: Mapping[str, str], forget_loss: str, seed: int) -> AlterUnlearnTrainer:
    """By the package's defaults but for the loss."""
    retain = {country: capital for country, capital in CAPITALS.items() if country not in forget}
    with tempfile.TemporaryDirectory() as folder:
        args = AlterUnlearnConfig(
            output_dir=folder, forget_loss=forget_loss, seed=seed, save_strategy="no", report_to="none", bf16=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = AlterUnlearnTrainer(
            model, args, train_dataset=rows(forget), retain_dataset=rows(retain), calibration_dataset=rows(UNSEEN),
            peft_config=AlterConfig(domains=["capitals"]), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget_loss", default="soft_targets", help="A name of FORGET_LOSSES.")
    parser.add_argument("--groups", type=int, nargs="+", help="Which threes, from 0; all by default.")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    names, totals = list(CAPITALS), [0, 0, 0, 0]
    for group in range(len(names) // GROUP) if given.groups is None else given.groups:
        forget = {name: CAPITALS[name] for name in names[GROUP * group : GROUP * (group + 1)]}
        kept = {name: capital for name, capital in CAPITALS.items() if name not in forget} | OTHERS
        model, tokenizer = smollm2.load()
        trainer = trained(model, tokenizer, forget, given.forget_loss, given.seed)
        said = answers(trainer.model, tokenizer, {**forget, **kept})
        for country, capital in forget.items():
            print(f"{country}, {capital}: {said[country]}", flush=True)
        counts = [says(forget, said), len(forget), says(kept, said), len(kept)]
        print(f"  {trainer.state.global_step} steps; forgotten: {counts[0]} said; others: {counts[2]} of {counts[3]}")
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    print(
        f"{given.forget_loss}: {totals[0]} of {totals[1]} forgotten capitals said, {totals[2]} of {totals[3]} others"
    )


if __name__ == "__main__":
    main()
