# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares, by name."""

from __future__ import annotations

from collections.abc import Mapping

from .alter import ALTER, ALTER_FIELD
from .field import FIELD, FieldMethod
from .full import FULL_METHODS
from .lora import CONTROLS, LORA_METHODS
from .method import Method


# ALTER, and what it is made of; the field's methods, FIELD, are there once for each of what they may train
OWN: dict[str, Method] = {**ALTER, **CONTROLS}
METHODS: dict[str, Method] = {**OWN, **LORA_METHODS, **ALTER_FIELD, **FULL_METHODS}
# what is compared unless other methods are named
DEFAULT_METHODS = (*OWN, "lora_ihl", "lora_ga", "lora_npo", "lora_simnpo")


def _listed(entries: Mapping[str, Method | FieldMethod]) -> str:
    return "; ".join(f"{name}: {one.caption}" for name, one in entries.items())


DESCRIBED = (
    f"What is compared, also variants with options of their own (lora_npo+mine): {_listed(OWN)}. With lora_, alter_ "
    "or full_ before the name, the field's methods on plain LoRA, ALTER's adapter (but for rmu) or all weights: "
    f"{_listed(FIELD)}."
)
