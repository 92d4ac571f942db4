# SPDX-License-Identifier: Apache-2.0
"""Options that come as text, from a command line or a YAML file."""

from __future__ import annotations

import copy
import inspect
import json
import textwrap
import types
from argparse import ArgumentTypeError
from collections.abc import Collection, Mapping
from dataclasses import MISSING, field, fields
from enum import Enum
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers.hf_argparser import string_to_bool


Class = TypeVar("Class", bound=type)
AS_CHAT = "Ask in a chat (true) or in plain text (false); unset: a chat if there is a template."
CHAT_TEMPLATE_KWARGS = (  # the help of an option of several commands
    "Variables of the chat template, as JSON on the command line: '{\"enable_thinking\": false}', or a date such as "
    '\'{"date_string": "26 Jul 2024"}\'. They are saved in the template beside an adapter, so that it is asked as it '
    "was trained."
)


def arguments_doc(cls: Class) -> Class:
    """The dataclass, with `Args:` in its docstring: type, default and help text of the fields that it declares."""
    own, lines = inspect.get_annotations(cls), [inspect.cleandoc(cls.__doc__ or ""), "\nArgs:"]
    for inner in fields(cls):
        if inner.name in own:
            default = inner.default if inner.default_factory is MISSING else inner.default_factory()
            optional = "" if default is MISSING else ", *optional*"
            says = "" if default in (MISSING, None) else f", defaults to `{default!r}`"
            lines.append(f"    {inner.name} (`{own[inner.name]}`{optional}{says}):")
            text = textwrap.fill(inner.metadata["help"], 111, break_on_hyphens=False)
            lines.append(textwrap.indent(text, " " * 8))
    cls.__doc__ = "\n".join(lines)
    return cls


def json_object(name: str, text: str) -> dict[str, Any]:
    """
    A dict from its JSON.

    Raises:
        ValueError: the text of option `name` is no JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is {text!r}, but must be a JSON object: '{{\"name\": value}}'.")
    return value


def option(default: Any, text: str) -> Any:
    """A field of a dataclass: its default, of which each instance gets a copy, and its help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def alternatives(hint: Any) -> dict[Any, Any]:
    """The members of a union, or the type itself, by what they are without their arguments (`list` of `list[int]`)."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member: member for member in members}


def parse_values(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Values of fields of a dataclass in the types of these: the text "5e-4", which it is to YAML, is a number there.

    Args:
        values: field -> value. A tuple is a list, an item may stand for a list of one, and text for a dict is JSON.

    Raises:
        ValueError: a value that the field does not take.
    """
    hints, known = get_type_hints(config), {inner.name: inner.metadata for inner in fields(config)}
    return {name: _parsed(name, value, hints[name], known[name].get("choices")) for name, value in values.items()}


def _parsed(name: str, value: Any, hint: Any, choices: Collection[Any] | None) -> Any:
    kinds = alternatives(hint)
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    choices = choices or [member.value for kind in enums for member in kind]
    if choices and isinstance(value, str) and value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {list(choices)}.")
    if isinstance(value, str) and dict in kinds and str not in kinds:
        return json_object(name, value)
    for origin in sorted(kinds, key=lambda origin: type(value) is not origin):  # what it is already comes first
        try:
            return _converted(value, origin, kinds[origin])
        except (TypeError, ValueError, KeyError, ArgumentTypeError):
            continue
    kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    if Literal in kinds:
        kind = " or ".join([*(["true or false"] if bool in kinds else []), *map(repr, get_args(kinds[Literal]))])
    raise ValueError(f"`{name}` is {value!r}, but must be {kind}.")


def _converted(value: Any, origin: Any, kind: Any) -> Any:
    """The value as a field of this type has it; an error if it takes no such value."""
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        (inner,) = get_args(kind)
        return [_converted(item, inner, inner) for item in items]
    if type(value) is origin:
        return value
    if value is None or isinstance(value, (list, tuple, dict)):
        raise TypeError
    if origin is Literal:
        return {str(known): known for known in get_args(kind)}[str(value)]
    if origin is bool:
        return string_to_bool(str(value))
    found = origin(str(value))
    return value if found == value and not isinstance(value, bool) else found  # as it was written: 3, not 3.0


def check_known(name: str, values: Collection[str], known: Collection[str]) -> None:
    """Raise a `ValueError` that names option `name` if it has values that are not known."""
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"`{name}` has {unknown}, but must be some of {list(known)}.")


def check_counts(**options: int | None) -> None:
    """Raise a `ValueError` if one of these options is neither unset nor at least 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, but must be 1 or more.")


def require_packages(*names: str) -> None:
    """Raise a `ValueError` if one of these packages is not installed; all are of the extra `eval`."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The packages {missing} are needed here, and not installed. Install them with `pip "
            "install alter-peft[eval]`."
        )
