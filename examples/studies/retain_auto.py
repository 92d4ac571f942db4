# SPDX-License-Identifier: Apache-2.0
"""
What `--retain auto` keeps: SmolLM2 forgets three capitals without rows to retain, with general text, and with
neighbours from a corpus besides.

python examples/studies/retain_auto.py --output_file retain_auto.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from alter_peft import UnlearnConfig, UnlearnTrainer, retain_auto
from alter_peft.demo import smollm2
from alter_peft.demo.facts import FORGET, OTHERS, RETAIN, UNSEEN, rows
from alter_peft.evaluation import Pair, score_answers


# In neither the general text nor the corpus
HELD_OUT = {
    "How many hours are in a day?": "There are 24 hours in a day.",
    "What do cows drink?": "Cows drink water.",
    "Which animal barks?": "Dogs bark.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "What is 5 times 6?": "5 times 6 is 30.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
    "What colour is grass?": "Grass is green.",
    "What is the largest planet in our solar system?": "The largest planet in our solar system is Jupiter.",
    "In which month is Christmas?": "Christmas is in December.",
    "What do we use to cut paper?": "We use scissors to cut paper.",
    "What gas do plants take in?": "Plants take in carbon dioxide.",
    "How many wheels does a car have?": "A car has four wheels.",
}


def measured(model: Any, tokenizer: Any) -> dict[str, float]:
    """Mean probability of the true answers of each set."""
    sets = {
        "forget": rows(FORGET),
        "capitals of the corpus": rows(RETAIN),
        "other capitals": rows(OTHERS),
        "held-out questions": Dataset.from_dict({"prompt": [*HELD_OUT], "completion": [*HELD_OUT.values()]}),
    }
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16):
        return {
            name: score_answers(model, tokenizer, [Pair(row["prompt"], row["completion"]) for row in found]).mean
            for name, found in sets.items()
        }


def trained(retain: Dataset, weight: float, folder: Path) -> dict[str, float]:
    """The same after plain LoRA, with the retain term weighted so."""
    model, tokenizer = smollm2.load()
    args = UnlearnConfig(
        output_dir=str(folder), save_strategy="no", report_to="none", disable_tqdm=True, bf16=True,
        num_train_epochs=30, learning_rate=5e-4, retain_weight=weight, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = UnlearnTrainer(
        model, args, train_dataset=rows(FORGET), retain_dataset=retain, calibration_dataset=rows(UNSEEN),
        peft_config=LoraConfig(target_modules="all-linear"), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return {**measured(trainer.model, tokenizer), "steps": trainer.state.global_step, "retain rows": len(retain)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_file", type=Path, required=True)
    args = parser.parse_args()
    forget = rows(FORGET)
    general, beside = retain_auto(forget), retain_auto(forget, rows(RETAIN))
    runs = {"no rows to retain": (general, 0.0), "--retain auto": (general, 1.0), "and --corpus": (beside, 1.0)}
    found = {"before": measured(*smollm2.load())}
    for name, (retain, weight) in runs.items():
        print(name, found, file=sys.stderr)
        found[name] = trained(retain, weight, args.output_file.parent)
        args.output_file.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
