# SPDX-License-Identifier: Apache-2.0
"""Which columns hold what: the names that the field uses, and those that the user says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .chats import is_chat
from .json_rows import Twice, written_out


Kind = Literal["tokens", "chats", "whole chats", "chat pairs", "choices", "pairs", "prompts", "text"]
# What a row may hold, as the trainers and metrics call it -> other names of it. One of them alone may be there, but
# the first of each list, TRL's name, comes before all others.
PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem")
COMPLETIONS = ("completion", "answer", "output", "response", "target", "reply")
# Multiple choice: MMLU's and WMDP's names, those of MMLU-Pro, and those of ARC, OpenBookQA and CommonsenseQA
QUESTIONS, CHOICES, RIGHT = (
    ("question", "question_stem"),
    ("choices", "options"),
    ("answer", "answerkey", "answer_key"),
)
LABEL = re.compile(r"\(?[A-J][).:]?")  # an answer that means nothing without choices
LETTERS = tuple("abcdefghij")  # a column for each choice, A to D at least, as in MMLU's own files
TEXTS = ("text", "definition", "document", "passage", "content", "article", "story", "body")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
# What an instruction may be about, in a column of its own: Alpaca's, Dolly's
BESIDE_INSTRUCTION = ("input", "context")
# What the same rows are evaluated with -> TOFU's names
# and another answer, which some forget losses teach, as open-unlearning calls it
ALTERNATE = "alternate"
OTHERS = {
    "paraphrase": "paraphrased_question", "rephrased": "paraphrased_answer", "wrong": "perturbed_answer",
    ALTERNATE: ALTERNATE,
}  # fmt: skip
# What may be a sub-domain under another name: what a row is about (RWKU, MMLU), or between whom (PISTOL). A `task`
# says in which way something is asked, and a `category` of which kind it is: neither is taken unasked.
LIKE_DOMAIN = ("subject", "edge")
EXTRAS = ("domain", *OTHERS)  # what rows may hold beside their text
SUBJECT = "subject"  # what rows to forget may hold besides: the names of whom or what they are about
TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")
CANONICAL = ("prompt", "completion", "text", "messages", SUBJECT, *EXTRAS)  # what `--columns` may name


COLUMNS_HELP = (
    "Which columns hold what, where their names are not recognised: prompt=question completion=answer domain=edge, "
    "text=body or messages=log; nothing after = takes none."
)


class Unrecognised(ValueError):
    """Why it cannot be told which columns hold the text: the end of a sentence about their source."""


class Ambiguous(Unrecognised):
    """Several columns may be meant."""


@dataclass(frozen=True)
class Taken:
    """
    What is taken of rows.

    Attributes:
        kind: what the rows are made of.
        columns: what a row holds -> the column with it.
        beside: columns whose text follows that of the prompt's, after a blank line.
        maybe_domain: a column that is a sub-domain if its values repeat.
        left: the other columns.
    """

    kind: Kind
    columns: Mapping[str, str]
    beside: tuple[str, ...] = ()
    maybe_domain: str | None = None
    left: tuple[str, ...] = field(default=(), compare=False)


def parse_columns(entries: Iterable[str]) -> dict[str, str]:
    """
    `--columns prompt=question domain=edge` as a dict; nothing after `=` takes none.

    Raises:
        ValueError: an entry of another form, an unknown name before `=`, or one that is given twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, column = entry.partition("=")
        if not equals or name not in CANONICAL or name in found:
            raise ValueError(
                f"`--columns` has {entry!r}, but must have entries like prompt=question, each of another one of "
                f"{list(CANONICAL)}."
            )
        found[name] = column
    return found


def choose(
    names: Iterable[str],
    first: Mapping[str, Any],
    given: Mapping[str, str] | None = None,
    text_field: str = "text",
    prompts_alone: bool = False,
    extras: Collection[str] = EXTRAS,
) -> Taken:
    """
    What is taken of columns.

    Args:
        names: of all columns.
        first: the first row, which tells lists from texts.
        given: what a row holds -> its column, said by the user; `""` for none.
        text_field: what plain text is called, before all other names of it; and if that is not TRL's default, before
            all names but `prompt` and `completion`.
        prompts_alone: whether rows without an answer will do.
        extras: what is taken beside the text, of `EXTRAS` and `SUBJECT`.

    Raises:
        Unrecognised: no known names, or several that may be meant; or a column that is given is not there.
    """
    given = given or {}
    missing = [column for column in given.values() if column and column not in set(names)]
    if missing:
        raise Unrecognised(f"has no column {missing[0]!r} (`--columns`), but {sorted(names)}. Correct it")
    names = list(names)
    lookup = _Lookup(names, given)
    taken = _told(lookup, first) or _recognised(lookup, first, text_field)
    if taken is None and prompts_alone and (prompt := lookup.one(PROMPTS)):
        taken = Taken("prompts", {"prompt": prompt}, lookup.beside(prompt))
    if taken is None:
        raise Unrecognised(f"has the columns {sorted(names)}, which name no known format")
    columns = {**taken.columns}
    for name in extras:
        if column := given.get(name, lookup.first(name, OTHERS.get(name, name))):
            columns[name] = column
    is_said = "domain" not in extras or "domain" in columns or "domain" in given
    maybe = None if is_said else lookup.first(*LIKE_DOMAIN)
    maybe = None if isinstance(first.get(maybe or ""), list) else maybe  # several names
    used = {*columns.values(), *taken.beside, maybe}
    left = tuple(name for name in names if name not in used)
    return Taken(taken.kind, columns, taken.beside, maybe, left)


class _Lookup:
    """Columns by name, whatever their case, without those that the user gave another meaning."""

    def __init__(self, names: list[str], given: Mapping[str, str]) -> None:
        self.given = given
        taken = set(given.values())
        self.own = [name for name in names if name not in taken]
        self.names: dict[str, str] = {}
        for name in names:
            if name not in taken:
                plain = name.strip().lower().replace(" ", "_").replace("-", "_")
                if plain == name or plain not in self.names:
                    self.names[plain] = name

    def first(self, *known: str) -> str | None:
        """The first of these that is there."""
        return next((self.names[name] for name in known if name in self.names), None)

    def one(self, known: tuple[str, ...]) -> str | None:
        """
        The column of these names: TRL's if it is there, and else the only one.

        Raises:
            Ambiguous: several may be meant.
        """
        if known[0] in self.names:
            return self.names[known[0]]
        found = [self.names[name] for name in known if name in self.names]
        if "instruction" in self.names and self.names["instruction"] in found:  # the others are what it is about
            found = [name for name in found if name not in self.beside(self.names["instruction"])]
        if len(found) > 1:
            raise Ambiguous(f"has the columns {found}, each of which may be the {known[0]}")
        return found[0] if found else None

    def beside(self, prompt: str) -> tuple[str, ...]:
        """The columns that belong to an instruction."""
        if self.names.get("instruction") != prompt:
            return ()
        return tuple(self.names[name] for name in BESIDE_INSTRUCTION if name in self.names)


def _told(lookup: _Lookup, first: Mapping[str, Any]) -> Taken | None:
    """What the user says that the text is."""
    given = {name: column for name, column in lookup.given.items() if column}
    kinds = [name for name in ("text", "messages") if name in given]
    pair = {name: given[name] for name in ("prompt", "completion") if name in given}
    if len(kinds) + bool(pair) > 1:
        raise Unrecognised(f"is to be read by {given} (`--columns`), which is more than one kind of text. Choose one")
    if kinds == ["text"]:
        return Taken("text", {"text": given["text"]})
    if kinds == ["messages"]:
        return Taken("chats", {"messages": given["messages"]})
    if not pair:
        return None
    prompt, completion = pair.get("prompt") or lookup.one(PROMPTS), pair.get("completion") or lookup.one(COMPLETIONS)
    return _pair(lookup, first, prompt, completion)


def _pair(lookup: _Lookup, first: Mapping[str, Any], prompt: str | None, completion: str | None) -> Taken | None:
    if prompt is None or completion is None:
        return None
    if is_chat(first.get(prompt)) or is_chat(first.get(completion)):
        return Taken("chat pairs", {"prompt": prompt, "completion": completion})
    return Taken("pairs", {"prompt": prompt, "completion": completion}, lookup.beside(prompt))


def _recognised(lookup: _Lookup, first: Mapping[str, Any], text_field: str) -> Taken | None:
    """What the names say."""
    names = lookup.names
    if "input_ids" in names and not isinstance(first[names["input_ids"]], str):
        columns = {name: names[name] for name in TOKENS if name in names and not isinstance(first[names[name]], str)}
        return Taken("tokens", columns)
    if {"prompt", "completion"} <= names.keys():
        return _pair(lookup, first, names["prompt"], names["completion"])
    named = text_field in lookup.own and not isinstance(first.get(text_field), list)
    if named and text_field != TEXTS[0]:
        return _plain(lookup, text_field)
    chat = lookup.first(*CHATS)
    if chat is not None and not isinstance(first.get(chat), str):
        return Taken("chats", {"messages": chat})
    if (choices := _choices(lookup, first)) is not None:
        return choices
    pair = _pair(lookup, first, lookup.one(PROMPTS), lookup.one(COMPLETIONS))
    if pair is not None:
        return pair
    if {"text", "labels"} <= names.keys() and isinstance(first.get(names["labels"]), str):  # KnowUnDo
        return Taken("pairs", {"prompt": names["text"], "completion": names["labels"]})
    text = text_field if named else lookup.one(TEXTS)
    return None if text is None else _plain(lookup, text)


def _choices(lookup: _Lookup, first: Mapping[str, Any]) -> Taken | None:
    """
    Multiple choice, whose answer is a letter or a number that means nothing without the choices.

    Files of questions that are answered freely may have a column of that name, empty or with something else: it holds
    choices if it lists something, or if the answer is a letter.
    """
    question, answer = lookup.first(*QUESTIONS), lookup.first(*RIGHT)
    if question is None or answer is None:
        return None
    choices = lookup.first(*CHOICES)
    if choices is not None and (_lists(first.get(choices)) or LABEL.fullmatch(str(first.get(answer)).strip())):
        return Taken("choices", {"question": question, "choices": choices, "answer": answer})
    columns = {letter.upper(): lookup.names[letter] for letter in LETTERS if letter in lookup.names}
    if not {"A", "B", "C", "D"} <= columns.keys():
        return None
    return Taken("choices", {"question": question, **columns, "answer": answer})


def _lists(value: Any) -> bool:
    """Whether a value is a list or an object, or a text that is one."""
    try:
        return isinstance(written_out(value) if isinstance(value, str) else value, list | tuple | dict)
    except Twice:
        return True


def _plain(lookup: _Lookup, text: str) -> Taken:
    columns = {"text": text}
    if text == lookup.names.get("definition") and "def_target" in lookup.names:  # ECBD's, with what was masked
        columns["masked"] = lookup.names["def_target"]
    return Taken("text", columns)
