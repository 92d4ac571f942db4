# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: the methods that make a model forget, a file a family."""

from .method import Method, UnlearningData
from .reading import TEACH, VARIANT, check_methods, method_named, read_options
from .registry import METHODS


__all__ = ["METHODS", "TEACH", "VARIANT", "Method", "UnlearningData", "check_methods", "method_named", "read_options"]
