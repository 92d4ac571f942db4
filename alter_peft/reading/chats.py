# SPDX-License-Identifier: Apache-2.0
"""Chats, in the forms that people log them -> turns with a role and a text; their answers, each with what precedes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .values import EMPTY, Unusable, as_text, is_blank


Turn = dict[str, Any]
# What logs call who speaks -> what chat templates call them
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
SPEAKER, SAID = ("role", "from"), ("content", "value")  # OpenAI's names, and ShareGPT's


def is_chat(value: Any) -> bool:
    """Whether this is a list of turns, in any of the forms that are known."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value) and bool(
        {*SPEAKER} & value[0].keys()
    )  # fmt: skip


def turns(value: Any) -> list[Turn]:
    """
    The turns of a chat, each with `role` and `content`.

    Args:
        value: a list of `{"role", "content"}` or of ShareGPT's `{"from", "value"}`; content may be a list of parts
            that are text.

    Raises:
        Unusable: it is none, or a turn is of an unknown role, of something else than text, or a call of a tool.
    """
    if not is_chat(value):
        raise Unusable('but needs a list of turns like {"role": "user", "content": "..."}. Write it so')
    return [_turn(number, one) for number, one in enumerate(value)]


def _turn(number: int, given: dict[str, Any]) -> Turn:
    role = _role(given)
    if role is None:
        who = next((given[name] for name in SPEAKER if given.get(name) is not None), None)
        raise Unusable(f"whose turn {number} is of the role {who!r}, but must be of one of {list(ROLES)}. Rename it")
    if given.get("tool_calls") or given.get("function_call"):
        raise Unusable(f"whose turn {number} calls a tool, which is no text. Leave that turn out, or write it as text")
    content = next((given[name] for name in SAID if given.get(name) is not None), None)
    try:
        return {"role": role, "content": _content(content)}
    except Unusable as error:
        raise Unusable(f"whose turn {number} ({role}) has {content!r:.60}, {error}") from error


def _content(content: Any) -> str:
    """A text, or the texts of content that comes in parts."""
    if not isinstance(content, list):
        return as_text(content)
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise Unusable(f"a part of which is of type {kind!r}, but text alone is read. Leave it out")
        parts.append(as_text(part.get("text") if isinstance(part, dict) else part))
    return "".join(parts)


def said(part: str | Sequence[Mapping[str, Any]]) -> str:
    """The text, or those of turns, whatever else these hold."""
    if isinstance(part, str):
        return part
    return " ".join(_said(turn) for turn in part)


def _said(turn: Mapping[str, Any]) -> str:
    content = next((turn[name] for name in SAID if turn.get(name) is not None), "")
    parts = content if isinstance(content, list) else [content]
    return "".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in parts)


def system_turns(part: str | Sequence[Mapping[str, Any]]) -> int:
    """How many turns of the system a chat begins with; a text has none."""
    roles = [] if isinstance(part, str) else [_role(turn) for turn in part]
    return next((number for number, role in enumerate(roles) if role != "system"), len(roles))


def _role(turn: Mapping[str, Any]) -> str | None:
    who = next((turn[name] for name in SPEAKER if turn.get(name) is not None), None)
    return ROLES.get(str(who).lower())


def answers(chat: list[Turn]) -> list[tuple[list[Turn], list[Turn]]]:
    """
    The assistant's turns, each as a prompt (all turns before it) and a completion (that turn alone).

    What the assistant says before any user has spoken, such as a greeting, answers nothing and is part of prompts
    alone.

    Raises:
        Unusable: there is no answer, or one without text.
    """
    found: list[tuple[list[Turn], list[Turn]]] = []
    for number, turn in enumerate(chat):
        before = chat[:number]
        if turn["role"] != "assistant" or not any(one["role"] == "user" for one in before):
            continue
        content = turn["content"]
        if not turn.get("tool_calls") and (not content or (isinstance(content, str) and is_blank(content))):
            raise Unusable(f"whose turn {number} (assistant) has {content!r}, {EMPTY}")
        found.append((before, [turn]))
    if not found:
        raise Unusable(
            "in which no turn of the assistant follows one of a user, so that there is no answer. Remove it"
        )
    return found
