# SPDX-License-Identifier: Apache-2.0
"""What leaves a model as it was: a copy that is a model of its own, and its adapters off for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

from peft import PeftModel
from torch import nn


def copied(model: Any) -> Any:
    """
    A copy of a model that runs its own weights.

    A model that was trained has wrappers of its `forward`, of accelerate for autocast and of TRL for the fused head,
    which a copy would share: its passes would run the original. They are left behind, so that the copy computes in
    the precision of the context.

    Raises:
        ValueError: a module whose `forward` was replaced by something else than such a wrapper.
    """
    found = copy.deepcopy(model)
    for name, module in found.named_modules():
        if "forward" not in module.__dict__ or "_hf_hook" in module.__dict__:  # a device map's, which is copied along
            continue
        if _function(module.forward) is not _function(type(module).forward):
            raise ValueError(
                f"`model` has a `forward` of its own in {name or type(model).__name__!r}, which its copy would share. "
                "Save the model, load it and attack that one."
            )
        del module.forward
        module.__dict__.pop("_original_forward", None)  # accelerate's
    return found


def _function(method: Any) -> Any:
    """The function that a method and its wrappers call in the end."""
    method = unwrap(method)
    return unwrap(getattr(method, "__func__", method))


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """
    The model inside without its adapters.

    Afterwards the same weights learn as before: PEFT's `disable_adapter` leaves those of the active adapters learning.
    """
    learning: list[tuple[nn.Parameter, bool]] = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, learns in learning:
            weight.requires_grad_(learns)
