# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares, by name."""

from __future__ import annotations

from .alter import ALTER
from .lora import LORA_METHODS
from .method import Method


METHODS: dict[str, Method] = {**ALTER, **LORA_METHODS}
