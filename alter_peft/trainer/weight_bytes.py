# SPDX-License-Identifier: Apache-2.0
"""The bytes of a model's tensors, as they are hashed: those that ZeRO-3 has split and quantised ones, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .distributed import zero3_gathered


class WeightBytes(NamedTuple):
    """
    A tensor of a model.

    name: in the model's `state_dict`.
    shape, dtype: as the model sees it.
    parts: uint8 arrays of what it is stored as; several where it is quantised by torchao.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Any]


def weight_bytes(model: nn.Module, names: Iterable[str], sample: int | None = None) -> Iterator[WeightBytes]:
    """
    What the named tensors are stored as; what is no tensor is left out.

    Args:
        model: where ZeRO-3 has split it, all processes call this together.
        names: in the model's `state_dict`.
        sample: look at about so many numbers of each, evenly spaced, in place of all.
    """
    parameters, state = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    for name in names:
        if isinstance(state[name], Tensor):
            with zero3_gathered([parameters[name]] if name in parameters else []):
                held = parameters.get(name, state[name]).detach()
                parts = [_as_bytes(part, sample) for part in _stored(held)]
                yield WeightBytes(name, tuple(held.shape), held.dtype, parts)


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: torchao's have integers and their scales inside."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))


def _as_bytes(tensor: Tensor, sample: int | None) -> Any:
    flat = tensor.flatten()
    some = flat if sample is None else flat[:: max(1, len(flat) // sample)]
    return some.cpu().contiguous().view(torch.uint8).numpy()
