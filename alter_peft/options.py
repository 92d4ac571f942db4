# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Options that come as text, from a command line or a YAML file."""

from __future__ import annotations

import json
import types
from argparse import ArgumentError
from collections.abc import Collection, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser


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
            `None` are left as they are where they may be.

    Raises:
        ValueError: a value that its flag does not take.
    """
    parser, hints = HfArgumentParser(config, exit_on_error=False), get_type_hints(config)
    flags: dict[str, list[str]] = {}
    for name, value in values.items():
        kinds = {get_origin(kind) or kind for kind in alternatives(hints[name])}
        whole = value in (None, []) or isinstance(value, dict)  # there is no flag for it
        if (whole and type(value) in kinds) or value == parser.get_default(name):
            continue
        flags[name] = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    found, wrong = dict(values), None
    try:
        parsed, _ = parser.parse_known_args([part for flag in flags.values() for part in flag])
        for name in flags:
            found[name] = getattr(parsed, name)
            wrong = name if isinstance(values[name], list) and not isinstance(found[name], list) else wrong
    except ArgumentError as error:
        wrong = str(error.argument_name).partition("/")[0].lstrip("-")
    if wrong is not None:
        kind = hints[wrong].__name__ if isinstance(hints[wrong], type) else str(hints[wrong]).replace("typing.", "")
        raise ValueError(f"`{wrong}` is {values[wrong]!r}, but must be {kind}.")
    # what is the same number stays as it was written: 3, not 3.0
    return {name: values[name] if value == values[name] else value for name, value in found.items()}


def check_known(name: str, values: Collection[str], known: Collection[str]) -> None:
    """Raise a `ValueError` that names option `name` if it has values that are not known."""
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"`{name}` has {unknown}, but must be some of {list(known)}.")


def check_counts(arguments: Any, names: Collection[str]) -> None:
    """Raise a `ValueError` if one of these options is neither unset nor at least 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, but must be 1 or more.")
