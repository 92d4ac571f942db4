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
"""The pilot on TOFU: forget01 (40 pairs, two authors), 100 retain pairs, measured against a retain-only oracle.

    make tofu

Needs the TOFU files in ../shared/data/tofu, or in the folder given as the first argument. Writes runs/tofu.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.evaluation import Pair, write_results
from alter_peft.evaluation.attack_prompts import IDLE


DATA = Path(__file__).parents[1].parent / "shared" / "data" / "tofu"
OUT = Path("runs/tofu")
SEED = 0
EPOCHS = 6
FORGET_SETS = ("forget", "paraphrased", "after 200 tokens")


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def perturbed(rows: list[dict]) -> list[Pair]:
    """Questions with their false answers; some sets keep one answer and some a list."""
    return [Pair(r["question"], r["answer"], tuple(r["perturbed_answer"])) for r in rows]


def questions(folder: Path, name: str) -> list[Pair]:
    return [Pair(r["question"], r["answer"]) for r in read(folder, name)]


def taught_target(folder: Path) -> PreTrainedModel:
    """The model that knows all of it."""
    everything = questions(folder, "forget01") + questions(folder, "retain99")[:100]
    return smollm2.taught(OUT / "target", everything, EPOCHS, SEED)


def make_trainer(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
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
        train_dataset=smollm2.chats(questions(folder, "forget01")),
        retain_dataset=smollm2.chats(questions(folder, "retain99")[:100]),
        calibration_dataset=smollm2.chats(questions(folder, "holdout01")),
        peft_config=adapter or AlterConfig(),
        processing_class=tokenizer,
    )


def main(folder: Path = DATA) -> dict:
    set_seed(SEED)
    OUT.mkdir(parents=True, exist_ok=True)
    forget = questions(folder, "forget01")
    sets = {
        "forget": forget,
        "paraphrased": [Pair(r["paraphrased_question"], r["answer"]) for r in read(folder, "forget01_perturbed")],
        "after 200 tokens": [Pair(IDLE + pair.prompt, pair.completion) for pair in forget],
        "retain": questions(folder, "retain99")[:100],
        "real authors": perturbed(read(folder, "real_authors_perturbed")[:40]),
        "world": perturbed(read(folder, "world_facts_perturbed")[:40]),
    }
    tokenizer = smollm2.load()[1]
    target = taught_target(folder)
    oracle = smollm2.taught(OUT / "oracle", questions(folder, "retain99")[:100], EPOCHS, SEED)
    results = {"before": smollm2.measured(target, tokenizer, sets, FORGET_SETS)}
    trainer = make_trainer(target, tokenizer, folder)
    trainer.train()
    trainer.save_model()
    results["after"] = smollm2.measured(trainer.model, tokenizer, sets, FORGET_SETS, routed=True)
    results["oracle"] = smollm2.measured(oracle, tokenizer, sets, FORGET_SETS)
    table = write_results(results, "after", OUT, "TOFU forget01, pilot setting")
    print(f"\n{table}\n\nlevel of text never seen {trainer.forget_level:.3f}")
    return results


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
