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
"""Teach a small model fictitious facts, make it forget three sub-domains, and compare with one that never knew them.

    make demo

About ten minutes on two CPU cores. Writes runs/demo/{adapter,table.md,results.json,trade.png}.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import smollm2
from transformers import set_seed

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.evaluation import Pair, evaluate_sets, write_results


DATA = Path(__file__).parent / "demo_data"
OUT = Path("runs/demo")
SEED = 0
EPOCHS = 5
FORGET_SETS = ("forget", "paraphrased", "after 200 tokens")
# About 200 tokens of idle talk that someone might put before a question to hide its subject
IDLE = (
    "Before I ask, a word about the weather, which has been kinder this week than last. On Monday we walked along the "
    "canal and counted the boats, and my cousin said that the herons were back. We bought bread at the corner, sat on "
    "a bench, and watched two boys try to fly a kite that was far too large for them. In the evening there was soup "
    "with leeks, and somebody told a long story about a train that stopped for an hour because a cow stood on the "
    "rails. I have since been reading about tides, which depend on the moon, and about the way that bakers keep their "
    "yeast alive through the winter. There is also the matter of the garden: the roses want cutting, the gate wants "
    "oil, and the ladder is still on loan to the people across the street, who are painting their shutters green. "
    "None of this is urgent, of course, and I only mention it because it has been on my mind. Now to my question.\n\n"
)


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def main() -> None:
    start = time.time()
    set_seed(SEED)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = {name: read(name) for name in ("forget", "retain", "neighbours", "holdout", "world")}
    pairs = {name: [Pair(r["prompt"], r["completion"]) for r in part] for name, part in rows.items()}
    sets = {
        "forget": pairs["forget"],
        "paraphrased": [Pair(r["paraphrase"], r["completion"]) for r in rows["forget"]],
        "after 200 tokens": [Pair(IDLE + r["prompt"], r["completion"]) for r in rows["forget"]],
        "retain": pairs["retain"],
        "neighbours": pairs["neighbours"],
        "world": [Pair(r["prompt"], r["completion"], tuple(r["wrong"])) for r in rows["world"]],
    }
    kept = pairs["retain"] + pairs["neighbours"]
    tokenizer = smollm2.load()[1]
    target = smollm2.taught(OUT / "target", pairs["forget"] + kept, EPOCHS, SEED)
    oracle = smollm2.taught(OUT / "oracle", kept, EPOCHS, SEED)
    results = {"before": evaluate_sets(target, tokenizer, sets, FORGET_SETS, 8, "before")}

    args = AlterUnlearnConfig(
        output_dir=str(OUT / "adapter"), seed=SEED,
        save_strategy="no", report_to="none", logging_steps=5,
    )  # fmt: skip
    trainer = AlterUnlearnTrainer(
        target,
        args,
        train_dataset=smollm2.chats(pairs["forget"], [r["domain"] for r in rows["forget"]]),
        retain_dataset=smollm2.chats(pairs["retain"]),
        calibration_dataset=smollm2.chats(pairs["holdout"]),
        peft_config=AlterConfig(),
        processing_class=tokenizer,
    )
    unlearning = time.time()
    trainer.train()
    unlearning = time.time() - unlearning
    trainer.save_model()
    results["after"] = evaluate_sets(trainer.model, tokenizer, sets, FORGET_SETS, 8, "after")
    results["oracle"] = evaluate_sets(oracle, tokenizer, sets, FORGET_SETS, 8, "oracle")

    table = write_results(results, "after", OUT, "SmolLM2-135M-Instruct: three sub-domains forgotten")
    print(f"\n{table}\n")
    print(
        f"level of text never seen {trainer.forget_level:.3f}, unlearning {unlearning:.0f} s, "
        f"all {time.time() - start:.0f} s"
    )
    print(f"adapter, table and picture: {OUT.resolve()}")


if __name__ == "__main__":
    main()
