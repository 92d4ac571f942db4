# SPDX-License-Identifier: Apache-2.0
"""`alter-peft generate`: asks a model that wears an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoConfig
from transformers.hf_argparser import string_to_bool

from alter_peft.chat import Message, chat_or_plain, prompt_ids
from alter_peft.evaluation.loading import load_model, load_tokenizer, loaded, merge_of
from alter_peft.options import AS_CHAT, CHAT_TEMPLATE_KWARGS, json_object
from alter_peft.reading import COLUMNS_HELP, parse_columns, read_rows
from alter_peft.scoring import ScoredModel

from .parser import CommandParser


def generate(argv: Sequence[str]) -> Callable[[], None]:
    """What answers prompts with an adapter, greedily, and on demand without it."""
    parser = CommandParser(prog="alter-peft generate", description="Ask a model that wears an adapter.")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument(
        "--model",
        help="base model, if it isn't where the adapter was trained; may itself be a LoRA adapter, which is merged",
    )
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
    model, tokenizer = _load(args.adapter, args.model)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = chat_or_plain(tokenizer, args.as_chat, template_kwargs)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    positions, longest = ScoredModel(model).positions, max(map(len, encoded))
    if positions is not None and longest + args.max_new_tokens > positions:
        raise ValueError(
            f"`--max_new_tokens` is {args.max_new_tokens} and the longest prompt has {longest} tokens, but the model "
            f"has {positions} positions for both. Ask for less, or shorten the prompt."
        )

    def run() -> None:
        for prompt, ids in zip(prompts, encoded, strict=True):
            print(f"prompt:  {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
            print(f"adapter: {_answer(model, tokenizer, ids, args.max_new_tokens)}")
            if args.without_adapter:
                print(f"base:    {_answer(model, tokenizer, ids, args.max_new_tokens, with_adapter=False)}")

    return run


def _prompts(source: str, columns: Sequence[str]) -> list[str | list[Message]]:
    """What a file asks: its prompts, of chats all turns before an answer, or its texts."""
    rows = read_rows("--prompts", source, parse_columns(columns), prompts_alone=True, extras=())
    if "input_ids" in rows.dataset.column_names:
        raise ValueError(f"`--prompts` is {source!r}, which has token ids (`input_ids`). Give texts.")
    print(rows.taken, file=sys.stderr)
    name = "prompt" if "prompt" in rows.dataset.column_names else "text"
    return list(rows.dataset[name])


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
    return adapted, load_tokenizer(source, adapter)


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


def _answer(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, with_adapter: bool = True) -> str:
    ids = torch.tensor([prompt], device=model.device)
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
