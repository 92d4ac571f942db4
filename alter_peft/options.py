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
from collections.abc import Collection
from typing import Any


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
