# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: the methods that make a model forget, a file a family."""

from .field import FIELD, FieldMethod
from .method import Method, UnlearningData, trained
from .reading import TEACH, VARIANT, check_methods, method_named, read_options
from .registry import DEFAULT_METHODS, DESCRIBED, METHODS, OWN


__all__ = [
    "DEFAULT_METHODS",
    "DESCRIBED",
    "FIELD",
    "METHODS",
    "OWN",
    "TEACH",
    "VARIANT",
    "FieldMethod",
    "Method",
    "UnlearningData",
    "check_methods",
    "method_named",
    "read_options",
    "trained",
]
