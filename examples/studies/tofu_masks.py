# SPDX-License-Identifier: Apache-2.0
"""Does it matter which tokens count as low-entropy ones? Fixed threshold, quantile, and a shuffled mask as control.

    python examples/studies/tofu_masks.py

After `make tofu`, whose target it loads. With the hinge, whose mask it is, for the paper's three epochs: the level
loss takes whole answers.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import set_seed

from alter_peft import AlterConfig
from alter_peft.data import PairDataset
from alter_peft.evaluation import score_answers


sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples that it builds on
import smollm2
import tofu


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    """The entropies of the answer tokens dealt out anew among all answer tokens: as many low ones, elsewhere."""
    rows = [list(row) for row in dataset["entropy"]]
    # S at t masks the label at t + 1
    places = [
        (i, t)
        for i, labels in enumerate(dataset["labels"])
        for t, label in enumerate(labels[1:])
        if label != -100
    ]  # fmt: skip
    values = [rows[i][t] for i, t in places]
    random.Random(seed).shuffle(values)
    for (i, t), value in zip(places, values, strict=True):
        rows[i][t] = value
    return dataset.remove_columns("entropy").add_column("entropy", rows)


def main(folder: Path = tofu.DATA) -> None:
    tokenizer = smollm2.load()[1]
    data = tofu.read(folder)
    asked = (data.forget, data.sets["paraphrased"], data.retain)
    arms = [("threshold 1.2", None, False)]
    arms += [(f"{word}, {q}", q, word == "shuffled") for q in (0.5, 0.8) for word in ("quantile", "shuffled")]
    print("| mask | threshold | low-entropy share | P forget | P paraphrased | P retain |\n|---|---|---|---|---|---|")
    for name, quantile, is_shuffled in arms:
        set_seed(tofu.SEED)
        options = {"forget_loss": "hinge", "num_train_epochs": 3, "disable_tqdm": True}
        target = tofu.taught_target(data)
        trainer = tofu.make_trainer(target, tokenizer, data, AlterConfig(entropy_quantile=quantile), **options)
        trainer.prepare()
        if is_shuffled:
            rows = trainer.train_dataset
            trainer.train_dataset = PairDataset(shuffled(rows.forget, tofu.SEED), rows.retain)
        trainer.train()
        shares = [log["tokens/low_entropy"] for log in trainer.state.log_history if "tokens/low_entropy" in log]
        with torch.autocast(trainer.model.device.type, torch.bfloat16):
            p = [score_answers(trainer.model, tokenizer, pairs).mean for pairs in asked]
        print(
            f"| {name} | {trainer.alter_config.entropy_threshold:.4f} | {sum(shares) / len(shares):.3f} "
            f"| {p[0]:.3f} | {p[1]:.3f} | {p[2]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
