# SPDX-License-Identifier: Apache-2.0
"""`alter-peft generate`: asks a model that wears an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import has_file

from alter_peft.evaluation.loading import load_model, load_tokenizer, loaded, merge_of

from .parser import CommandParser


def generate(argv: Sequence[str]) -> Callable[[], None]:
    """What answers prompts with an adapter, greedily, and on demand without it."""
    parser = CommandParser(prog="alter-peft generate", description="Ask a model that wears an adapter.")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument(
        "--model",
        help="base model, if it isn't where the adapter was trained; may itself be a LoRA adapter, which is merged",
    )
    parser.add_argument("--prompt", required=True, action="append", help="may be given more than once")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--without_adapter", action="store_true", help="print the base model's answer beside it")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"`--max_new_tokens` is {args.max_new_tokens}, but must be 1 or more.")
    model, tokenizer = _load(args.adapter, args.model)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def run() -> None:
        for prompt in args.prompt:
            print(f"prompt:  {prompt}")
            print(f"adapter: {_answer(model, tokenizer, prompt, args.max_new_tokens)}")
            if args.without_adapter:
                print(f"base:    {_answer(model, tokenizer, prompt, args.max_new_tokens, with_adapter=False)}")

    return run


def _load(adapter: str, model: str | None) -> tuple[Any, Any]:
    """The adapter on the model that is given, or else on its own base, and the tokenizer; what is merged is said."""
    if model is not None:
        name, source = "--model", model
    else:
        config = loaded("--adapter", adapter, PeftConfig.from_pretrained)
        name, source = "--adapter", _checked_base(adapter, config.base_model_name_or_path, config.revision)
    merge = merge_of(name, source)
    if merge is not None:
        print(f"`--model` {merge}" if model else f"the base model of `--adapter`, '{source}', {merge}")
    if model is None and merge is None:
        adapted = loaded("--adapter", adapter, AutoPeftModelForCausalLM.from_pretrained)
    else:
        adapted = loaded("--adapter", adapter, partial(PeftModel.from_pretrained, loaded(name, source, load_model)))
    own = has_file(adapter, "tokenizer_config.json")
    return adapted, loaded(name, adapter if own else source, AutoTokenizer.from_pretrained if own else load_tokenizer)


def _checked_base(adapter: str, base: str | None, revision: str | None) -> str:
    """The base model that an adapter names; a `ValueError` if it is not there."""
    try:
        if not base:
            raise OSError("it has no name")
        if merge_of("base_model_name_or_path", base) is None:
            AutoConfig.from_pretrained(base, revision=revision)
        return base
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--adapter` is {adapter!r}, whose base model {base!r} could not be loaded ({error}). If it was moved, "
            "say where it is by `--model`."
        ) from error


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
