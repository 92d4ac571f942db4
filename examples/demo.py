# SPDX-License-Identifier: Apache-2.0
"""Teach a small model fictitious facts, make it forget three sub-domains, and compare with one that never knew them.

    make demo

Ten minutes on two CPU cores. Writes runs/demo/{adapter,table.md,results.json,trade.png}. Another seed, for the
teaching as for the unlearning, is an argument: `python examples/demo.py 1` writes runs/demo-1.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import smollm2
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.evaluation import IDLE, Pair
from alter_peft.evaluation.loading import load
from alter_peft.report import write_results


DATA = Path(__file__).parent / "demo_data"
EPOCHS = 5
FORGET_SETS = ("forget", "paraphrased", "after 200 tokens")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def read_pairs(name: str) -> list[Pair]:
    return [Pair(r["prompt"], r["completion"], tuple(r.get("wrong", ()))) for r in read(name)]


def read_sets() -> dict[str, list[Pair]]:
    """What the models are asked, set by set."""
    forget = read("forget")
    return {
        "forget": read_pairs("forget"),
        "paraphrased": [Pair(r["paraphrase"], r["completion"]) for r in forget],
        "after 200 tokens": [Pair(IDLE + r["prompt"], r["completion"]) for r in forget],
        "retain": read_pairs("retain"),
        "neighbours": read_pairs("neighbours"),
        "bystanders": read_pairs("bystanders"),
        "world": read_pairs("world"),
    }


def kept_pairs() -> list[Pair]:
    """What target and oracle know and shall know; of it, the trainer is given `retain` alone."""
    return [pair for name in ("retain", "neighbours", "bystanders") for pair in read_pairs(name)]


def taught_target(folder: Path, seed: int) -> PreTrainedModel:
    """The model that knows all of it."""
    return smollm2.taught(folder / "target", read_pairs("forget") + kept_pairs(), EPOCHS, seed)


def make_trainer(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, **options: Any
) -> AlterUnlearnTrainer:
    """The trainer of the demo; it is the same for whoever studies a part of it."""
    args = AlterUnlearnConfig(
        output_dir=str(folder / "adapter"), seed=seed,
        save_strategy="no", report_to="none", logging_steps=5, **options,
    )  # fmt: skip
    return AlterUnlearnTrainer(
        target,
        args,
        train_dataset=smollm2.chats(read_pairs("forget"), [r["domain"] for r in read("forget")]),
        retain_dataset=smollm2.chats(read_pairs("retain")),
        calibration_dataset=smollm2.chats(read_pairs("holdout")),
        peft_config=AlterConfig(),
        processing_class=tokenizer,
    )


def main(seed: int = 0) -> None:
    start = time.time()
    set_seed(seed)
    folder = Path(f"runs/demo-{seed}" if seed else "runs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    sets, tokenizer = read_sets(), smollm2.load()[1]
    target = taught_target(folder, seed)
    oracle = smollm2.taught(folder / "oracle", kept_pairs(), EPOCHS, seed)
    taught = time.time() - start
    results = {"before": smollm2.measured(target, tokenizer, sets, FORGET_SETS)}
    trainer = make_trainer(target, tokenizer, folder, seed)
    unlearning = time.time()
    trainer.train()
    unlearning = time.time() - unlearning
    trainer.save_model()
    adapted = PeftModel.from_pretrained(load(folder / "target"), str(folder / "adapter"))  # as any user would
    results["after"] = smollm2.measured(adapted, tokenizer, sets, FORGET_SETS, routed=True)
    results["oracle"] = smollm2.measured(oracle, tokenizer, sets, FORGET_SETS)

    table = write_results(results, "after", folder, "SmolLM2-135M-Instruct: three sub-domains forgotten")
    print(f"\n{table}\n")
    print(
        f"level of text never seen {trainer.forget_level:.3f}; "
        f"teaching {taught:.0f} s, unlearning {unlearning:.0f} s, all {time.time() - start:.0f} s"
    )
    print(f"adapter, table and picture: {folder.resolve()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
