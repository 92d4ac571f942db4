# SPDX-License-Identifier: Apache-2.0
"""`alter-peft generate`: asks a model that wears an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from transformers.hf_argparser import string_to_bool

from alter_peft.chat import Message, chat_or_plain, prompt_ids
from alter_peft.evaluation.loading import load_tokenizer, loaded
from alter_peft.options import AS_CHAT, CHAT_TEMPLATE_KWARGS, json_object
from alter_peft.reading import COLUMNS_HELP, parse_columns, read_rows

from .parser import CommandParser


def generate(argv: Sequence[str]) -> Callable[[], None]:
    """What answers prompts with an adapter, greedily, and on demand without it."""
    parser = CommandParser(prog="alter-peft generate", description="Ask a model that wears an adapter.")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--model", help="base model, if it isn't where the adapter was trained")
    parser.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    parser.add_argument("--prompts", help="rows with prompts, from whatever `unlearn` reads; of a .txt file each line")
    parser.add_argument("--columns", nargs="+", default=[], help=COLUMNS_HELP)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--without_adapter", action="store_true", help="print the base model's answer beside it")
    parser.add_argument("--as_chat", type=string_to_bool, help=AS_CHAT)
    parser.add_argument("--chat_template_kwargs", help=CHAT_TEMPLATE_KWARGS)
    args = parser.parse_args(argv)
    given = args.chat_template_kwargs
    template_kwargs = None if given is None else json_object("chat_template_kwargs", given)
    prompts = [*args.prompt, *(_prompts(args.prompts, args.columns) if args.prompts else [])]
    if not prompts:
        raise ValueError("`--prompt` is missing. Give a prompt, or a file of them by `--prompts`.")
    if args.max_new_tokens < 1:
        raise ValueError(f"`--max_new_tokens` is {args.max_new_tokens}, but must be 1 or more.")
    if args.model is None:
        model: Any = loaded("--adapter", args.adapter, AutoPeftModelForCausalLM.from_pretrained)
    else:
        base = loaded("--model", args.model, AutoModelForCausalLM.from_pretrained)
        model = loaded("--adapter", args.adapter, partial(PeftModel.from_pretrained, base))
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    base_name = args.model or model.active_peft_config.base_model_name_or_path
    tokenizer = chat_or_plain(load_tokenizer(base_name, args.adapter), args.as_chat, template_kwargs)

    def run() -> None:
        for prompt in prompts:
            print(f"prompt:  {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
            print(f"adapter: {_answer(model, tokenizer, prompt, args.max_new_tokens)}")
            if args.without_adapter:
                print(f"base:    {_answer(model, tokenizer, prompt, args.max_new_tokens, with_adapter=False)}")

    return run


def _prompts(source: str, columns: Sequence[str]) -> list[str | list[Message]]:
    """What a file asks: its prompts, of chats all turns before an answer, or its texts."""
    rows = read_rows("--prompts", source, parse_columns(columns), prompts_alone=True)
    if "input_ids" in rows.dataset.column_names:
        raise ValueError(f"`--prompts` is {source!r}, which has token ids (`input_ids`). Give texts.")
    print(rows.taken, file=sys.stderr)
    name = "prompt" if "prompt" in rows.dataset.column_names else "text"
    return list(rows.dataset[name])


def _answer(
    model: Any, tokenizer: Any, prompt: str | Sequence[Message], max_new_tokens: int, with_adapter: bool = True
) -> str:
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    with nullcontext() if with_adapter else model.disable_adapter():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()
