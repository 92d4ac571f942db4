# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model an adapter has not brought: those that an attacker with the files can train or round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def base_parameters(model: Any) -> list[nn.Parameter]:
    """
    The base model's own parameters, each once; of a plain model, all of them.

    What PEFT has added is left out: adapters, routers, prompts, `modules_to_save`.

    Raises:
        ValueError: a base weight is stored in integers, as in a model that was loaded quantised.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    added = {id(parameter) for module in base.modules() for parameter in _added(module)}
    for name, parameter in base.named_parameters():
        if id(parameter) not in added and not parameter.is_floating_point():
            raise ValueError(
                f"`model` has the weight {name!r} of {parameter.dtype}, but this attack needs floating-point weights. "
                "Load the base model without quantisation."
            )
    return [parameter for parameter in base.parameters() if id(parameter) not in added]


def _added(module: nn.Module) -> Iterator[nn.Parameter]:
    """What a layer of PEFT holds beside the module that it wraps."""
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        yield from module.parameters(recurse=False)
        for name, child in module.named_children():
            if name not in ("base_layer", "original_module") and not isinstance(child, BaseTunerLayer):
                yield from child.parameters()
