# SPDX-License-Identifier: Apache-2.0
"""What a decoder does with its linear layers, found out on a copy of it that computes nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


logger = logging.getLogger(__name__)

BATCH, LENGTH = 5, 7  # of the pass: no other size of a model's is likely to be one of these, or their product


class LayerUse(NamedTuple):
    """
    How one pass used a linear layer.

    shapes: of the inputs that it was called with, without their last dimension.
    is_read: whether its weight was also read past its `forward`, where no adapter would take part.
    is_linear: whether all that it returned was one vector for each of the input's; Llama 4's router returns more.
    """

    shapes: tuple[tuple[int, ...], ...]
    is_read: bool
    is_linear: bool

    @property
    def is_by_token(self) -> bool:
        """Whether the inputs are (B, T, k)."""
        return set(self.shapes) == {(BATCH, LENGTH)}

    @property
    def is_flattened(self) -> bool:
        """Whether the input is the (B T, k) of all tokens in their order, as OPT's and that of shared experts."""
        return self.shapes == ((BATCH * LENGTH,),)


class _Reads(TorchFunctionMode):
    """Notes which linear layers are called, with what, and which weights are used outside the layers' own forward."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
        self.read: set[str] = set()
        self.not_linear: set[str] = set()
        self._running: set[int] = set()  # weights whose layer is in its forward
        self._owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            self._owners.setdefault(id(layer.weight), []).append(name)
            layer.register_forward_pre_hook(self._begin(name))
            layer.register_forward_hook(self._end(name))

    def _begin(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def begin(module: Any, args: tuple[Any, ...]) -> None:
            self.shapes[name].append(tuple(args[0].shape[:-1]))
            self._running.add(id(module.weight))

        return begin

    def _end(self, name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def end(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self._running.discard(id(module.weight))
            if not isinstance(output, Tensor) or output.shape[:-1] != args[0].shape[:-1]:
                self.not_linear.add(name)

        return end

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)):
            for value in given:
                if isinstance(value, nn.Parameter) and id(value) not in self._running:
                    self.read.update(self._owners.get(id(value), ()))
        return result


def uses_of_layers(model: PreTrainedModel) -> dict[str, LayerUse]:
    """
    How a decoder uses each of its linear layers, by name; empty if that cannot be told.

    A copy of fake tensors is run on a batch of `BATCH` rows of `LENGTH` tokens: nothing is computed and no weights are
    needed, so that it matters not whether those are quantised, offloaded or split over processes, and every process
    finds the same. What only an accelerator's kernels do is not seen (`READ_BY_KERNELS` in `targets`).
    """
    model_class: Any = type(model)
    return _uses(model_class, _Key(model.config))


class _Key:
    """A config that `lru_cache` takes for another one of the same values."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self._values = config, config.to_json_string()

    def __hash__(self) -> int:
        return hash(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._values == other._values


@lru_cache(maxsize=16)
def _uses(model_class: Any, key: _Key) -> dict[str, LayerUse]:
    config: Any = copy.deepcopy(key.config)
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"  # of any device, without loops
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), fake:
            twin = model_class(config).eval()
            ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
            with _Reads({n: m for n, m in twin.named_modules() if isinstance(m, (nn.Linear, Conv1D))}) as reads:
                twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # of any kind: what depends on values, which there are none of, or on other inputs
        logger.info("What %s does with its layers could not be found out: %s", model_class.__name__, error)
        return {}
    return {
        name: LayerUse(tuple(shapes), name in reads.read, name not in reads.not_linear)
        for name, shapes in reads.shapes.items()
    }
