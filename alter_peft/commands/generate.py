# SPDX-License-Identifier: Apache-2.0
"""`alter-peft generate`: asks a model that wears an adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alter_peft.evaluation.loading import loaded


def generate(argv: Sequence[str]) -> Callable[[], None]:
    """What answers prompts with an adapter, greedily, and on demand without it."""
    parser = argparse.ArgumentParser(prog="alter-peft generate", description="Ask a model that wears an adapter.")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--model", help="base model, if it isn't where the adapter was trained")
    parser.add_argument("--prompt", required=True, action="append", help="may be given more than once")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--without_adapter", action="store_true", help="print the base model's answer beside it")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {args.max_new_tokens}, but must be 1 or more.")
    if args.model is None:
        model: Any = loaded("adapter", args.adapter, AutoPeftModelForCausalLM.from_pretrained)
    else:
        base = loaded("model", args.model, AutoModelForCausalLM.from_pretrained)
        model = loaded("adapter", args.adapter, partial(PeftModel.from_pretrained, base))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)

    def run() -> None:
        for prompt in args.prompt:
            print(f"prompt:  {prompt}")
            print(f"adapter: {_answer(model, tokenizer, prompt, args.max_new_tokens)}")
            if args.without_adapter:
                print(f"base:    {_answer(model, tokenizer, prompt, args.max_new_tokens, with_adapter=False)}")

    return run


def _answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, with_adapter: bool = True) -> str:
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    with nullcontext() if with_adapter else model.disable_adapter():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()
