# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning that the examples share, and SmolLM2-135M-Instruct, as a folder.

    python examples/smollm2.py FOLDER

saves it there, as a model for `alter-peft benchmark --model FOLDER`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alter_peft.benchmark.provenance import RECORD
from alter_peft.benchmark.teaching import teach
from alter_peft.demo.smollm2 import ATTENTION, load
from alter_peft.evaluation import Pair, Score
from alter_peft.evaluation.loading import load as load_model
from alter_peft.report import evaluate_sets


def chats(pairs: list[Pair], domains: list[str] | None = None) -> Dataset:
    """The pairs as conversational prompt-completion rows, the format of TRL."""
    rows = [
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "completion": [{"role": "assistant", "content": pair.completion}],
        }
        for pair in pairs
    ]
    if domains is not None:
        rows = [{**row, "domain": domain} for row, domain in zip(rows, domains, strict=True)]
    return Dataset.from_list(rows)


def measured(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Pair]],
    forget_sets: Sequence[str],
    routed: bool = False,
) -> dict[str, Score]:
    """The published figures are measured under bfloat16 autocast, on about 8 answers a set for ROUGE-L."""
    with torch.autocast(model.device.type, torch.bfloat16):
        return evaluate_sets(model, tokenizer, sets, forget_sets, 8, routed)


def taught(folder: Path, pairs: list[Pair], epochs: int, seed: int) -> PreTrainedModel:
    """
    SmolLM2 with all weights fine-tuned until it knows the pairs by heart; kept in `folder` for the next run.

    Raises:
        ValueError: the model in `folder` was taught otherwise.
    """
    record, kept = {"seed": seed, "epochs": epochs, "pairs": len(pairs)}, folder / RECORD
    if (folder / "config.json").exists():
        found = json.loads(kept.read_text()) if kept.exists() else None
        if found != record:
            raise ValueError(f"The model in {folder} was taught with {found}, not with {record}. Remove it.")
        model = load_model(folder)
    else:
        print(f"Teaching {folder.name}: {len(pairs)} pairs, {epochs} epochs", flush=True)
        model = teach(*load(), chats(pairs), folder, seed, record, num_train_epochs=epochs)
    model.set_attn_implementation(ATTENTION)
    return model


def main(folder: Path) -> None:
    """Save model and tokenizer as any other model, for the command line."""
    model, tokenizer = load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"model: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2"))
