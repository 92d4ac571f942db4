# SPDX-License-Identifier: Apache-2.0
"""Checks of single values of a config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


LARGEST = 2**31 - 1  # of a whole number, as in sizes of tensors and indices


def is_integer(value: object) -> bool:
    """Whether it is an int that fits into 32 bits, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_count(value: object) -> bool:
    """Whether it is a positive int."""
    return is_integer(value) and value > 0  # type: ignore[operator]


def is_index(value: object) -> bool:
    """Whether it is 0 or a positive int."""
    return is_integer(value) and value >= 0  # type: ignore[operator]


def is_finite_number(value: object) -> bool:
    """Whether it is an int or a float (no bool), and finite."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return is_finite_number(value) and value > 0  # type: ignore[operator]


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise a `ValueError` that names the field, the value and the fix, unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {fix}.")


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type as annotated: a union, a literal, a list, a dict or a class."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is list:  # as which JSON comes back; a config has sets and tuples, too
        listed = isinstance(value, (list, tuple, set, frozenset, range))
        return listed and isinstance(value, Iterable) and all(fits(one, inner[0]) for one in value)
    if origin is dict:
        mapped = isinstance(value, Mapping)
        return mapped and all(fits(key, inner[0]) and fits(one, inner[1]) for key, one in value.items())  # type: ignore
    if hint is Any:
        return True
    if hint is int:
        return is_integer(value)
    if hint is float:
        return is_finite_number(value)
    return isinstance(value, hint or NoneType)


def described(hint: Any) -> str:
    """A type as annotated, in JSON's words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(described, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is list:
        return f"a list, each {described(inner[0])}"
    if origin is dict:
        return f"an object, each value {described(inner[1])}"
    words = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: "null"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")
