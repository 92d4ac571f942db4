# SPDX-License-Identifier: Apache-2.0
"""Strict gradient isolation (Eq. 4), as far as the optimiser could break it: who has a step, and at which scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import AlterUnlearnConfig
from .distributed import full_tensor, uses_deepspeed


def source_of(name: str) -> str:
    """Where a parameter's gradient comes from: `shared` (A), an expert's own name (`retain`, `forget_0`), `other`."""
    if ".alter_A." in name:
        return "shared"
    return name.rpartition(".")[2] if ".alter_B." in name else "other"


def kind_of(source: str) -> str:
    """Which kind of group that is: `shared`, `experts` or `other`."""
    return source if source in ("shared", "other") else "experts"


def parameter_groups(model: nn.Module, each_expert: bool = False) -> dict[str, list[nn.Parameter]]:
    """
    The trainable parameters: `shared` (every A), `experts` (every B), `other` (biases, `modules_to_save`).

    Args:
        each_expert: a group for each expert by its own name, in place of `experts`.
    """
    groups: dict[str, list[nn.Parameter]] = {"shared": [], "experts": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            source = source_of(name)
            groups.setdefault(source if each_expert else kind_of(source), []).append(parameter)
    return groups


def optimizer_groups(model: nn.Module, args: AlterUnlearnConfig, each_expert: bool = False) -> list[dict[str, Any]]:
    """
    `parameter_groups` as an optimiser takes them, each with its rate: eta_A for A, eta_B for all else.

    Args:
        args: the rates, and the decay of weights.
        each_expert: as for `parameter_groups`.
    """
    rates, decay = {"shared": args.shared_learning_rate}, args.weight_decay
    return [
        {"name": name, "params": own, "lr": rates.get(name, args.learning_rate), "weight_decay": decay}
        for name, own in parameter_groups(model, each_expert).items()
        if own
    ]


def skip_groups(optimizer: torch.optim.Optimizer, skipped: Callable[[], set[str]]) -> RemovableHandle:
    """
    Before each step, take the gradients from the groups that are skipped, for DeepSpeed, which steps as backward ends.

    Args:
        skipped: the names of the groups that take no part in the present step.
    """

    def drop(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        names = skipped()
        for group in stepping.param_groups:
            for parameter in group["params"] if group["name"] in names else ():
                parameter.grad = None

    return optimizer.register_step_pre_hook(drop)


class Isolation(TrainerCallback):
    """
    No row, no step: an optimiser would move an expert by momentum and weight decay on a gradient of zero.

    Args:
        accelerator: of the training.
        skipped: which sources (see `source_of`) nothing of the present step teaches.
    """

    def __init__(self, accelerator: Accelerator, skipped: Callable[[], set[str]]) -> None:
        self.accelerator, self.skipped = accelerator, skipped

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if uses_deepspeed(self.accelerator):
            skip_groups(self.accelerator.deepspeed_engine_wrapped.engine.basic_optimizer, self.skipped)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        names = self.skipped()
        for name, parameter in model.named_parameters():
            if source_of(name) in names:
                parameter.grad = None


def clip_by_source(model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """
    Clip the gradients of A, of each expert (over all layers) and of the rest each by its own norm.

    One norm over all would let the loss of a forget row scale the step of B_r.

    Returns:
        The norms before clipping: `shared`, `retain`, `forget_0`, ..., `other`, as far as they have gradients.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(source_of(name), []).append(parameter)
    return {
        part: full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)) for part, parameters in parts.items()
    }


def norms_by_kind(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of all gradients of a kind (`kind_of`), from those of each source."""
    parts: dict[str, list[Tensor]] = {"shared": [], "experts": [], "other": []}
    for source, norm in norms.items():
        parts[kind_of(source)].append(norm)
    return {kind: torch.stack(own).norm().item() for kind, own in parts.items() if own}
