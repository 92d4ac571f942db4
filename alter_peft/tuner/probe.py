# SPDX-License-Identifier: Apache-2.0
"""What a decoder does with its linear layers, found out on a copy of it that computes nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D


logger = logging.getLogger(__name__)

BATCH, LENGTH = 5, 7  # of the pass: no other size of a model's is likely to be one of these, or their product
SOME = 3  # how many are taken to be found where that depends on the values
# Model types of which something cannot be found out, and it is known what works (`docs/peft_features.md`)
KNOWN_WITHOUT = frozenset({"cpmant", "jetmoe", "xlnet", "xlstm", "xmod"})


class LayerUse(NamedTuple):
    """
    How a linear layer was used.

    shapes: of the inputs that it was called with in a pass over B rows of T tokens, without their last dimension.
    next_shapes: likewise for one more token, from the cache.
    is_read: whether its weight was also read past its `forward`, where no adapter would take part.
    is_linear: whether all that it returned was one vector for each of the input's; Llama 4's router returns more.
    learns: whether a gradient of the logits reaches it.
    """

    shapes: tuple[tuple[int, ...], ...]
    next_shapes: tuple[tuple[int, ...], ...]
    is_read: bool
    is_linear: bool
    learns: bool

    @property
    def is_by_token(self) -> bool:
        """Whether the inputs are (B, T, k)."""
        return set(self.shapes) == {(BATCH, LENGTH)} and set(self.next_shapes) <= {(BATCH, 1)}

    @property
    def is_flattened(self) -> bool:
        """Whether the input is the (B T, k) of all tokens in their order, as OPT's and that of shared experts."""
        return self.shapes == ((BATCH * LENGTH,),) and self.next_shapes in ((), ((BATCH,),))


class Uses(NamedTuple):
    """
    What was found of a decoder.

    layers: its linear layers, by name.
    streams: the shape of the hidden states that each module of its lists is given first, by name.
    own_memory: what it goes on from beside, or in place of, a cache of transformers'; `None` without such a thing.
    """

    layers: dict[str, LayerUse]
    streams: dict[str, tuple[int, ...]]
    own_memory: str | None


def uses_of_layers(model: PreTrainedModel) -> Uses:
    """
    How a decoder uses each of its linear layers; empty if that cannot be told, which a warning says, once.

    A copy on the meta device is run on a batch of `BATCH` rows of `LENGTH` tokens: nothing is computed and no weights
    are needed, so that it matters not whether those are quantised, offloaded or split over processes, and every
    process finds the same. What only an accelerator's kernels do is not seen (`READ_BY_KERNELS` in `targets`).
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
def _uses(model_class: Any, key: _Key) -> Uses:
    config: Any = copy.deepcopy(key.config)
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"  # of any device, without loops
    own_memory = None
    try:
        with torch.device("meta"), _Guesses():
            twin = model_class(config).eval().requires_grad_(True)
            watch = _Watch(twin)
            ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
            with watch:
                output = twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            watch.find_gradients(output.logits)
    except Exception as error:  # of any kind: what depends on values, which there are none of, or on other inputs
        _say_unknown(
            config,
            f"What {model_class.__name__} does with its linear layers could not be found out ({error}): layers in "
            "which an adapter would do nothing are not left out, and a gated `router` that cannot follow the model is "
            "not refused. Use `AlterConfig(router='static')` and name the layers by `target_modules`, or see that "
            "each adapted layer, alone, changes the logits, and that a batch neighbour does not.",
        )
        return Uses({}, {}, None)
    try:
        with torch.device("meta"), _Guesses():
            own_memory = _next_token(twin, ids, watch, set(output))
    except Exception as error:
        _say_unknown(
            config,
            f"What {model_class.__name__} does from a cache could not be found out ({error}): a gated `router` that "
            "cannot follow it there is not refused. See that text generated by the adapted model is the same with "
            "`use_cache=False`, or use `AlterConfig(router='static')`.",
        )
    return Uses(watch.uses(), watch.streams, own_memory)


def _say_unknown(config: PreTrainedConfig, message: str) -> None:
    logger.log(logging.INFO if config.model_type in KNOWN_WITHOUT else logging.WARNING, message)


def _next_token(twin: Any, ids: Tensor, watch: _Watch, without_cache: set[str]) -> str | None:
    """Run one more token from the cache, where there is one; what else the model goes on from."""
    with torch.no_grad():
        output = twin(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    of_transformers = {name: value for name, value in output.items() if type(value).__module__ == Cache.__module__}
    if of_transformers:
        watch.shapes = watch.next_shapes
        with torch.no_grad(), watch:
            twin(input_ids=ids[:, :1], use_cache=True, **of_transformers)
    others = sorted(set(output) - without_cache - set(of_transformers))
    if not others:
        return None
    return type(output[others[0]]).__name__ if isinstance(output[others[0]], Cache) else others[0]


class _Guesses(TorchDispatchMode):
    """Answers what depends on the values, of which there are none: everything is true or 1, and some are found."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(SOME, args[0].dim(), dtype=torch.long, device=args[0].device)
        return func(*args, **(kwargs or {}))


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class _Watch(TorchFunctionMode):
    """Notes which linear layers are called, with what, and which weights are used outside the layers' own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        self.first_shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.layers}
        self.next_shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.layers}
        self.shapes = self.first_shapes
        self._is_on = False
        self.streams: dict[str, tuple[int, ...]] = {}
        self.read: set[str] = set()
        self.not_linear: set[str] = set()
        self.learn: set[str] = set()
        self._running: set[int] = set()  # weights whose layer is in its forward
        self._owners: dict[int, list[str]] = {}
        for name, layer in self.layers.items():
            self._owners.setdefault(id(layer.weight), []).append(name)
            layer.register_forward_pre_hook(self._begin(name))
            layer.register_forward_hook(self._end(name))
        for path, modules in model.named_modules():
            if isinstance(modules, nn.ModuleList):
                for number, module in enumerate(modules):
                    module.register_forward_pre_hook(self._stream(f"{path}.{number}"), with_kwargs=True)

    def __enter__(self) -> _Watch:
        self._is_on = True
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._is_on = False
        super().__exit__(*args)

    def uses(self) -> dict[str, LayerUse]:
        return {
            name: LayerUse(
                shapes=tuple(self.first_shapes[name]),
                next_shapes=tuple(self.next_shapes[name]),
                is_read=name in self.read,
                is_linear=name not in self.not_linear,
                learns=name in self.learn,
            )
            for name in self.layers
        }

    def find_gradients(self, logits: Tensor) -> None:
        weights = [layer.weight for layer in self.layers.values()]
        gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        self.learn = {name for name, found in zip(self.layers, gradients, strict=True) if found is not None}

    def _begin(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def begin(module: Any, args: tuple[Any, ...]) -> None:
            if self._is_on:
                self.shapes[name].append(tuple(args[0].shape[:-1]))
            self._running.add(id(module.weight))

        return begin

    def _end(self, name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def end(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self._running.discard(id(module.weight))
            if not isinstance(output, Tensor) or output.shape[:-1] != args[0].shape[:-1]:
                self.not_linear.add(name)

        return end

    def _stream(self, name: str) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            if isinstance(first, Tensor):
                self.streams.setdefault(name, tuple(first.shape))

        return note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)):
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, nn.Parameter) and id(value) not in self._running:
                    self.read.update(self._owners.get(id(value), ()))
        return result
