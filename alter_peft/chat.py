# SPDX-License-Identifier: Apache-2.0
"""Conversations and texts -> token ids, and which of them are answers: the same in training, scoring and asking."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


Message = Mapping[str, Any]
# Stands for an answer in a template, to be found again: no template changes letters and digits
PLACEHOLDER = "answer7Q4x"


class Encoded(NamedTuple):
    """
    ids: the token ids, (T,).
    is_answer: whether each is of an answer, of its text or of what ends its turn, (T,).
    """

    ids: list[int]
    is_answer: list[bool]

    @property
    def start(self) -> int:
        """Where the first answer begins; T without one."""
        return self.is_answer.index(True) if True in self.is_answer else len(self.ids)

    @property
    def labels(self) -> list[int]:
        """The ids of the answers, -100 elsewhere, (T,)."""
        return [i if own else -100 for i, own in zip(self.ids, self.is_answer, strict=True)]


def chat_or_plain(
    tokenizer: PreTrainedTokenizerBase,
    as_chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """
    The tokenizer with which questions are asked as turns of a chat, or as plain text: all here asks by its template.

    Args:
        as_chat: as in [`AlterUnlearnConfig`]: a chat if there is a template (`None`) or without question (`True`), or
            plain text even so (`False`), which gives a copy without the template.
        chat_template_kwargs: as of [`with_template_defaults`], which gives a copy, too.

    Raises:
        ValueError: a chat is asked for, and there is no template; or see [`with_template_defaults`].
    """
    if as_chat and tokenizer.chat_template is None:
        raise ValueError(
            "`as_chat` is True, but the tokenizer has no chat template. Give it one, or leave `as_chat` unset to ask "
            "in plain text."
        )
    plain = as_chat is False and tokenizer.chat_template is not None
    if not (plain or chat_template_kwargs):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if plain:
        tokenizer.chat_template = None
    if chat_template_kwargs:
        tokenizer.chat_template = with_template_defaults(tokenizer.chat_template, chat_template_kwargs)
    return tokenizer


def with_template_defaults(template: Any, values: Mapping[str, Any]) -> Any:
    """
    The chat template, with these values for variables that it reads and that a caller leaves unset.

    They are written into the template, so that they are saved with the tokenizer, and whoever asks by it, such as
    `generate` or a server, asks as in training. Given again, the later value counts.

    Args:
        template: a Jinja template, or several by name.
        values: such as `{"enable_thinking": False, "date_string": "26 Jul 2024"}`.

    Raises:
        ValueError: there is no template, or none reads a variable of this name.
    """
    templates = template if isinstance(template, dict) else {"default": template or ""}
    for name in values:
        if not any(re.search(rf"\b{re.escape(name)}\b", one) for one in templates.values()):
            raise ValueError(
                f"`chat_template_kwargs` names {name!r}, but "
                + ("the chat template reads no such variable." if template else "there is no chat template.")
                + " Correct the name, or remove it."
            )
    head = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in values.items()
    )
    found = {name: one if one.startswith(head) else head + one for name, one in templates.items()}
    return found if isinstance(template, dict) else found["default"]


def as_messages(prompt: str | Sequence[Message], answer: str | Sequence[Message]) -> tuple[list[Message], int]:
    """The messages of a prompt and an answer, each a text or turns already, and how many are of the prompt."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    told = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    return [*asked, *told], len(asked)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    first: int = 0,
    given: str = "",
    **template_kwargs: Any,
) -> Encoded:
    """
    A conversation under the tokenizer's chat template; answers are the texts of the assistant's turns from `first` on.

    What a template puts before an answer, such as a header or an empty block of thoughts, is none of it: the tokens
    before the first answer are what the model is to be asked with. Of what follows an answer that is, which ends its
    turn. A token over the border of the two is of the answer.

    Args:
        first: the first message whose text may be an answer.
        given: the beginning of the answers that is none of them, but put in the model's mouth.
        template_kwargs: for the template.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation.
    """
    text = _render(tokenizer, messages, **template_kwargs)
    answered = [
        i
        for i, one in enumerate(messages)
        if i >= first and one["role"] == "assistant" and one.get("content") is not None
    ]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    is_answer = [False] * len(ids)
    end_of_turn: str | None = None
    for i in reversed(answered):
        before, after = _around(tokenizer, messages, i, **template_kwargs)
        if end_of_turn is None:
            end_of_turn = after
            if i < len(messages) - 1:
                end_of_turn = _around(tokenizer, messages[: i + 1], i, **template_kwargs)[1]
        start = len(_common(text, before))
        end = len(text) - len(_common(text[start:][::-1], after[::-1]))
        end += len(_common(after, end_of_turn))
        start += next((len(one) for one in (given, given.lstrip()) if text.startswith(one, start)), 0)
        begin = _border(tokenizer, text[:start], ids)
        stop = len(ids) if end == len(text) else _border(tokenizer, text[:end], ids)
        is_answer[begin:stop] = [True] * (stop - begin)
    return Encoded(ids, is_answer)


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, given: str = "") -> Encoded:
    """
    A text of a prompt, the given beginning of the answer and the answer, one after the other, and EOS if there is one.

    The answer begins where the ids leave those of the prompt alone, which may be earlier than these end: tokens merge
    over the border, and some tokenizers end every text by EOS. Without a prompt all is answer but what the tokenizer
    begins every text with.
    """
    end = tokenizer.eos_token or ""
    whole = prompt + given + (answer if answer.endswith(end) else answer + end)
    ids = tokenizer(whole)["input_ids"]
    start = len(_common(tokenizer(prompt + given)["input_ids"], ids))
    return Encoded(ids, [False] * start + [True] * (len(ids) - start))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], **template_kwargs: Any
) -> list[int]:
    """
    What a model is asked with, (T,): the ids before the answer, whatever that will be, as in training.

    Without a chat template and without a prompt it is what the tokenizer begins every text with, else EOS, which
    stands before a text where texts follow one another, else BOS.

    Raises:
        ValueError: as [`encode_conversation`]; or there is nothing to ask with.
    """
    if tokenizer.chat_template is None and isinstance(prompt, str):
        # an answer begins with the space that the prompt hasn't ended with
        encoded = encode_text(tokenizer, prompt, PLACEHOLDER if prompt[-1:].isspace() else f" {PLACEHOLDER}")
    else:
        messages, first = as_messages(prompt, PLACEHOLDER)
        encoded = encode_conversation(tokenizer, messages, first, **template_kwargs)
    ids = encoded.ids[: encoded.start]
    ids = ids or [i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if isinstance(i, int)][:1]
    if not ids:
        raise ValueError("The prompt is empty, and the tokenizer has no BOS and no EOS to begin with. Give a prompt.")
    return ids


def encode_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    as_chat: bool | None = None,
    answers_only: bool = True,
) -> dict[str, list[int]]:
    """
    The `input_ids` and `labels`, each (T,), of a row of `prompt` and `completion`, `messages` or a text.

    Labels are the answers of a conversation, the completion of a prompt, and all of a text. The columns `tools` and
    `chat_template_kwargs` are for the template.

    Args:
        as_chat: whether texts of `prompt` and `completion` are turns of a chat; by default if there is a template.
        answers_only: whether what isn't an answer is left unlabelled.
    """
    tools = row.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    if "messages" in row:
        encoded = encode_conversation(tokenizer, row["messages"], **kwargs)
    elif "prompt" in row:
        both = row["prompt"], row["completion"]
        is_text = all(isinstance(one, str) for one in both)
        if is_text and (as_chat is False or tokenizer.chat_template is None):
            encoded = encode_text(tokenizer, *both)
        else:
            encoded = encode_conversation(tokenizer, *as_messages(*both), **kwargs)
    else:
        ids = encode_text(tokenizer, "", row[text_field]).ids
        encoded = Encoded(ids, [True] * len(ids))
    return {"input_ids": encoded.ids, "labels": encoded.labels if answers_only else encoded.ids}


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **template_kwargs: Any) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The rows are conversations, but the tokenizer has no chat template. Give it one (`chat_template_path` in "
            "training), or give the rows as texts."
        )
    try:
        return str(tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, **template_kwargs))
    except TemplateError as error:
        roles = [one["role"] for one in messages]
        raise ValueError(f"The chat template refuses a conversation of the roles {roles}: {error}.") from error


def _around(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], at: int, **template_kwargs: Any
) -> tuple[str, str]:
    """What the template puts before and after the text of one of the messages."""
    content: Any = PLACEHOLDER
    if not isinstance(messages[at]["content"], str):  # parts, as of models that see images
        content = [{"type": "text", "text": PLACEHOLDER}]
    marked = [{**one, "content": content} if i == at else one for i, one in enumerate(messages)]
    before, found, after = _render(tokenizer, marked, **template_kwargs).rpartition(PLACEHOLDER)
    if not found:
        raise ValueError(
            f"The chat template leaves out the text of message {at}, of the role {messages[at]['role']!r}. Give the "
            "row without it, or use another template."
        )
    return before, after


def _border(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> int:
    """How many of the ids are of this beginning of their text alone."""
    return len(_common(tokenizer(text, add_special_tokens=False)["input_ids"], ids))


def _common(one: Any, other: Any) -> Any:
    """The beginning that two texts, or two lists, have in common."""
    return one[: sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))]
