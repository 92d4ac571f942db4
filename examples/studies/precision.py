# SPDX-License-Identifier: Apache-2.0
"""What share of greedy answers does a batch neighbour, or the KV cache, change, in each precision?

    python examples/studies/precision.py [--prompts 60] [--smollm2]

Of random adapters on a tiny random Llama, or on SmolLM2-135M-Instruct; answers of 12 tokens to random prompts of 4 to
19 tokens. A row beside another one is padded on the left.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alter_peft import AlterConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--smollm2", action="store_true", help="of SmolLM2-135M-Instruct instead of a tiny model")
    args = parser.parse_args()
    base = read_smollm2() if args.smollm2 else tiny()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (args.prompts,), generator=generator).tolist()
    prompts = [torch.randint(4, base.config.vocab_size, (length,), generator=generator) for length in lengths]
    print("| precision | model | answers that a neighbour changes | that the cache changes |\n|---|---|---|---|")
    for precision in ("float32", "float32, bfloat16 autocast", "bfloat16"):
        for name, model in adapted(base):
            if precision == "bfloat16":
                model = model.to(torch.bfloat16)
            with torch.autocast(model.device.type, torch.bfloat16, enabled="autocast" in precision):
                neighbour, cache = changed(model, prompts)
            print(f"| {precision} | {name} | {neighbour} of {len(prompts)} | {cache} of {len(prompts)} |", flush=True)


def tiny() -> LlamaForCausalLM:
    """Large embeddings and a large head, so that next tokens differ by more than rounding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=120, **sizes, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.lm_head.weight.mul_(30)
    return model


def read_smollm2() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import smollm2

    return smollm2.load()[0].eval()


def adapted(base: Any) -> Iterator[tuple[str, Any]]:
    """The base model, and random adapters on copies of it."""
    yield "base", copy.deepcopy(base)
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    yield "LoRA", get_peft_model(copy.deepcopy(base), lora).eval()
    routers = {"static": {"router": "static"}, "gated": {}, "reference mode": {"inference_entropy": "base"}}
    for name, router in routers.items():
        torch.manual_seed(1)
        config = AlterConfig(
            num_forget_experts=2, init_weights=False, entropy_threshold=0.8, task_type="CAUSAL_LM", **router
        )
        yield f"ALTER, {name}", get_peft_model(copy.deepcopy(base), config).eval()


def changed(model: Any, prompts: list[Tensor]) -> tuple[int, int]:
    """Answers that are others beside the next prompt, and without a cache, than alone and with one."""
    beside = [answers(model, [prompt, prompts[row - 1]])[0] for row, prompt in enumerate(prompts)]
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    whole = [answers(model, [prompt], use_cache=False)[0] for prompt in prompts]
    return tuple(sum(a != b for a, b in zip(alone, other, strict=True)) for other in (beside, whole))


def answers(model: Any, prompts: list[Tensor], **options: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()


if __name__ == "__main__":
    main()
