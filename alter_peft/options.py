# SPDX-License-Identifier: Apache-2.0
"""Options that come as text, from a command line or a YAML file."""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from argparse import ArgumentError
from collections.abc import Collection, Mapping
from dataclasses import MISSING, field, fields
from importlib.util import find_spec
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser


Class = TypeVar("Class", bound=type)


def option(default: Any, help: str) -> Any:
    """A field of a dataclass: its default, or what makes it, and its help text."""
    own: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return field(**own, metadata={"help": help})


def arguments_doc(cls: Class) -> Class:
    """The dataclass, with `Args:` in its docstring: type, default and help text of the fields that it declares."""
    own, lines = inspect.get_annotations(cls), [inspect.cleandoc(cls.__doc__ or ""), "\nArgs:"]
    for one in fields(cls):
        if one.name in own:
            default = one.default if one.default_factory is MISSING else one.default_factory()
            optional = "" if default is MISSING else ", *optional*"
            says = "" if default in (MISSING, None) else f", defaults to `{default!r}`"
            lines.append(f"    {one.name} (`{own[one.name]}`{optional}{says}):")
            text = textwrap.fill(one.metadata["help"], 111, break_on_hyphens=False)
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
        raise ValueError(f"`{name}` is {text!r}, but must be a JSON object such as '{{\"q_proj\": 4}}'.")
    return value


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def parse_values(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Values of fields of a dataclass as its flags take them: the text "5e-4", which it is to YAML, is a number there.

    Args:
        values: field -> value; all that have no default must be there. A dict, an empty list and
            `None` are left as they are where they may be; a tuple is a list.

    Raises:
        ValueError: a value that its flag does not take.
    """
    parser, hints = HfArgumentParser(config, exit_on_error=False), get_type_hints(config)
    required = {field.name for field in fields(config) if field.default is field.default_factory is MISSING}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    flags: dict[str, list[str]] = {}
    for name, value in values.items():
        kinds = {get_origin(kind) or kind for kind in alternatives(hints[name])}
        whole = value in (None, []) or isinstance(value, dict)  # there is no flag for it
        # by its text, as True == 1
        usual = name not in required and repr(value) == repr(parser.get_default(name))
        if (whole and type(value) in kinds) or usual:
            continue
        items = value if isinstance(value, list) else [value]
        if whole or any(item is None or isinstance(item, (dict, list)) for item in items):
            raise _refusal(name, value, hints[name])
        flags[name] = [f"--{name}={item}" for item in items]  # a flag an item, which may then begin with "-"
    found, every = dict(values), [flag for of_field in flags.values() for flag in of_field]
    try:
        for name, of_field in flags.items():
            taken = [getattr(parser.parse_args([*every, flag]), name) for flag in of_field]  # the last one counts
            if isinstance(values[name], list) and not all(isinstance(one, list) for one in taken):
                raise _refusal(name, values[name], hints[name])
            found[name] = [item for one in taken for item in one] if isinstance(taken[0], list) else taken[0]
    except ArgumentError as error:
        wrong = str(error.argument_name).partition("/")[0].lstrip("-")
        raise _refusal(wrong, values[wrong], hints[wrong]) from None
    # what is the same number stays as it was written: 3, not 3.0
    return {
        name: values[name] if value == values[name] and not isinstance(value, bool) else value
        for name, value in found.items()
    }


def _refusal(name: str, value: Any, hint: Any) -> ValueError:
    kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ValueError(f"`{name}` is {value!r}, but must be {kind}.")


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
            f"The packages {missing} are needed for what is to be measured, and not installed. Install them with `pip "
            "install alter-peft[eval]`."
        )
