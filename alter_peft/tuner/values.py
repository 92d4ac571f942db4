# SPDX-License-Identifier: Apache-2.0
"""Checks of single values of a config."""

from __future__ import annotations

import math


def is_integer(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_index(value: object) -> bool:
    """Whether it is 0 or a positive int."""
    return is_integer(value) and value >= 0  # type: ignore[operator]


def is_finite_number(value: object) -> bool:
    """Whether it is an int or a float (no bool), and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return is_finite_number(value) and value > 0  # type: ignore[operator]


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise a `ValueError` that names the field, the value and the fix, unless the condition holds."""
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {fix}.")
