# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows have different adapters: `adapter_names` of PEFT's `forward` and `generate`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationMixin


BASE = "__base__"  # PEFT's name for "no adapter"


class RowAdapters(NamedTuple):
    """
    Which adapter each row of a batch has.

    names: one for each row, `"__base__"` for none.
    copies: how many rows `generate` makes of one (beams or returned sequences); an encoder still sees each once.
    """

    names: tuple[str, ...]
    copies: int = 1

    @property
    def adapters(self) -> list[str]:
        """Each adapter once, `"__base__"` left out."""
        return [name for name in dict.fromkeys(self.names) if name != BASE]

    def of(self, batch: int) -> list[str]:
        """The names of the rows of a batch of this size; a `ValueError` if the names are for another size."""
        if batch == len(self.names):
            return list(self.names)
        if batch == len(self.names) * self.copies:
            return [name for name in self.names for _ in range(self.copies)]
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {batch} respectively."
        )

    def groups(self, batch: int) -> dict[str, list[int]]:
        """Adapter -> its rows, for a batch of this size."""
        found: dict[str, list[int]] = {name: [] for name in self.adapters}
        for row, name in enumerate(self.of(batch)):
            if name != BASE:
                found[name].append(row)
        return found


class _RowHook:
    """
    Pre-hook of PEFT's wrappers (`modules_to_save`, trainable tokens), which take the names as an argument: those of
    the thread that has set it.
    """

    def __init__(self, mixed: RowAdapters) -> None:
        self.mixed, self.thread = mixed, threading.get_ident()

    def __call__(self, wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # disabled in the base pass, whose head reads one row for each token
        if wrapper.disable_adapters or threading.get_ident() != self.thread:
            return None
        names = self.mixed.of(args[0].shape[0])
        # an adapter that has no copy of this module uses the base model's
        return args, {**kwargs, "adapter_names": [name if name in wrapper._adapters else BASE for name in names]}


def check_adapter_names(tuner: BaseTuner, names: Any) -> None:
    """
    Raise if a mixed batch cannot be run.

    Raises:
        TypeError: the names are no list.
        ValueError: the model is in training mode or has merged adapters, or a name is unknown.
    """
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got `adapter_names` of type {type(names)}, expected a list of str.")
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(names) - {BASE} - set(tuner.peft_config))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in tuner.modules()):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )


def copies_of_a_row(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many rows `generate`, called with these arguments, makes of one; 1 for a model that doesn't generate."""
    if not isinstance(model, GenerationMixin):
        return 1
    config = kwargs.get("generation_config") or model.generation_config
    beams = kwargs.get("num_beams", config.num_beams)
    return max(beams or 1, kwargs.get("num_return_sequences", config.num_return_sequences) or 1)


@contextmanager
def adapters_of_wrappers(model: nn.Module, mixed: RowAdapters) -> Iterator[None]:
    """Inside, PEFT's own wrappers (`modules_to_save`, trainable tokens) give each row those of its adapter."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.enter_context(module.register_forward_pre_hook(_RowHook(mixed), with_kwargs=True))
        yield
