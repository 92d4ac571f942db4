# SPDX-License-Identifier: Apache-2.0
"""Does S matter at inference? Answers and speed of `inference_entropy="none"` (fast) against `"base"` (reference).

    python examples/studies/inference_entropy.py

After `make demo`, whose target and adapter it loads. Greedy answers of 40 tokens to 12 questions of each set.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import alter_peft  # noqa: F401 (registers ALTER)
from alter_peft.evaluation import encode_pair, score_answers


sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples that it builds on
import demo
import smollm2


FOLDER = Path("runs/demo")
TOKENS, ROUNDS = 40, 5


def main() -> None:
    tokenizer = smollm2.load()[1]
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "target", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(FOLDER / "adapter")).eval()
    config = model.peft_config["default"]
    sets = demo.read_sets()

    def answers(pairs: list) -> tuple[torch.Tensor, float]:
        prompts = [ids[:length] for ids, length in (encode_pair(tokenizer, pair) for pair in pairs)]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
            out = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :], time.perf_counter() - start

    print("| set | answers equal | tokens equal | P none | P base |\n|---|---|---|---|---|")
    for name, pairs in sets.items():
        asked, found, probability = pairs[:: max(1, len(pairs) // 12)], {}, {}
        for mode in ("none", "base"):
            config.inference_entropy = mode
            found[mode] = answers(asked)[0]
            with torch.autocast("cpu", torch.bfloat16):
                probability[mode] = score_answers(model, tokenizer, pairs).mean
        equal = found["none"] == found["base"]
        print(
            f"| {name} | {int(equal.all(dim=1).sum())} of {len(equal)} | {equal.float().mean():.3f} "
            f"| {probability['none']:.3f} | {probability['base']:.3f} |"
        )

    asked, times = sets["retain"][::6], {"base model alone": [], "none": [], "base": []}
    for _ in range(ROUNDS):  # in turn, so that drift of the machine falls on all alike
        for mode, measured in times.items():
            if mode == "base model alone":
                with model.disable_adapter():
                    measured.append(answers(asked)[1])
            else:
                config.inference_entropy = mode
                measured.append(answers(asked)[1])
    print(f"\ngenerate, {len(asked)} rows of {TOKENS} tokens: median s (lowest to highest of {ROUNDS}), ratio")
    alone = statistics.median(times["base model alone"])
    for mode, measured in times.items():
        median = statistics.median(measured)
        print(f"{mode}: {median:.2f} ({min(measured):.2f} to {max(measured):.2f}), {median / alone:.2f}")


if __name__ == "__main__":
    main()
