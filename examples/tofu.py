# SPDX-License-Identifier: Apache-2.0
"""The pilot on TOFU: forget01 (40 pairs, two authors), 100 retain pairs, 40 of bystanders, beside an oracle without.

    make tofu

Needs the TOFU files in ../shared/data/tofu, or in the folder given as the first argument. Writes runs/tofu.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import smollm2
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.evaluation import FORGET_SETS, TofuData, read_tofu
from alter_peft.evaluation.loading import load
from alter_peft.report import write_results


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "tofu"
OUT = Path("runs/tofu")
SEED = 0
EPOCHS = 6


def read(folder: Path) -> TofuData:
    return read_tofu(folder, "forget01", retain_rows=100)


def taught_target(data: TofuData) -> PreTrainedModel:
    """The model that knows all of it."""
    return smollm2.taught(OUT / "target", data.forget + data.retain + data.bystanders, EPOCHS, SEED)


def make_trainer(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TofuData,
    adapter: AlterConfig | None = None,
    **options: Any,
) -> AlterUnlearnTrainer:
    """The trainer of the pilot; it is the same for whoever studies a part of it."""
    args = AlterUnlearnConfig(
        output_dir=str(OUT / "adapter"), seed=SEED,
        save_strategy="no", report_to="none", logging_steps=5, **options,
    )  # fmt: skip
    return AlterUnlearnTrainer(
        target,
        args,
        train_dataset=smollm2.chats(data.forget),
        retain_dataset=smollm2.chats(data.retain),
        calibration_dataset=smollm2.chats(data.calibration),
        peft_config=adapter or AlterConfig(),
        processing_class=tokenizer,
    )


def main(folder: Path = DATA) -> dict:
    set_seed(SEED)
    OUT.mkdir(parents=True, exist_ok=True)
    data = read(folder)
    sets = {
        "forget": data.forget,
        "paraphrased": data.sets["paraphrased"],
        "after 200 tokens": data.sets["after 200 tokens"],
        "retain": data.retain,
        "bystanders": data.bystanders,
        "real authors": data.sets["real_authors"][:40],
        "world": data.sets["world_facts"][:40],
    }
    tokenizer = smollm2.load()[1]
    target = taught_target(data)
    oracle = smollm2.taught(OUT / "oracle", data.retain + data.bystanders, EPOCHS, SEED)
    results = {"before": smollm2.measured(target, tokenizer, sets, FORGET_SETS)}
    trainer = make_trainer(target, tokenizer, data)
    trainer.train()
    trainer.save_model()
    adapted = PeftModel.from_pretrained(load(OUT / "target"), str(OUT / "adapter"))  # as any user would
    results["after"] = smollm2.measured(adapted, tokenizer, sets, FORGET_SETS, routed=True)
    results["oracle"] = smollm2.measured(oracle, tokenizer, sets, FORGET_SETS)
    table = write_results(results, "after", OUT, "TOFU forget01, pilot setting")
    print(f"\n{table}\n\nlevel of text never seen {trainer.forget_level:.3f}")
    return results


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
