# SPDX-License-Identifier: Apache-2.0
"""Which layers of a base model an adapter may have, and the models and layers that are refused."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeGuard

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alter_peft.registration import PREFIX

from .config import ADAPTED_FROM, ROUTER_LAYER, AlterConfig
from .decoder import Decoder
from .probe import uses_of_layers
from .uses import BATCH, LENGTH


logger = logging.getLogger(__name__)

BYPASSED = "(read without calling the layer, so that an adapter there would do nothing)"
UNUSED = "(no gradient reaches them from text alone)"
# Model type -> why a gated router cannot follow it, where `uses_of_layers` does not show it
UNGATEABLE = {
    "jetmoe": "its experts sort the tokens by their values",
    "reformer": "its layers are reversible, and hold no gradient",
    "xlm": "it has a cache for an encoder, too",
    "xlnet": "it reads in any order",
}
# Model type -> layers whose weights the fused kernels of accelerators read, which `uses_of_layers` does not see
READ_BY_KERNELS = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"), ("out_proj",)),
}


def refuse_split_weights(model: nn.Module) -> None:
    """Raise a `ValueError` if the base weights are in parts already, as after a tensor-parallel load."""
    split = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
    if split is not None or (isinstance(model, PreTrainedModel) and (model.tp_size or 1) > 1):
        raise ValueError(
            f"The model's weights are split over processes (the first is {split!r}), as by `tp_plan` or "
            "`distributed_config`, which ALTER does not support. Load it without these; for training in parts, launch "
            "with FSDP 2 (`examples/accelerate_configs/fsdp2.yaml`)."
        )


def refuse_shared_weights(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Raise a `ValueError` if one of these adapters is on a layer whose weight others have, too, as Zamba's blocks."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and set(adapter_names) & set(module._get_available_adapters()):
            for _, parameter in module.get_base_layer().named_parameters(recurse=False):
                shared = [other.removesuffix(".base_layer") for other in owners.get(id(parameter), ())]
                if len(shared) > 1:
                    raise ValueError(
                        f"{shared[0]!r} and {shared[1]!r} have one weight in common, so that what is merged into the "
                        "first would change the second, too. Keep the adapter unmerged, or make one without these "
                        f"layers, by `exclude_modules=[{shared[0].rpartition('.')[2]!r}]`."
                    )


def check_name(adapter_name: str) -> None:
    """Raise a `ValueError` if an adapter would be named as an expert is."""
    if re.fullmatch(r"retain|forget_\d+", adapter_name):
        raise ValueError(
            f"The adapter's name is {adapter_name!r}, which is the name of an expert, so that its weights could not "
            "be told from those of other adapters. Choose another name."
        )


def refuse_unfelt(parent: nn.Module, target_name: str, key: str) -> None:
    """Raise a `ValueError` for a layer of PyTorch's attention, which reads its weight without calling it."""
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"Target module {key!r}: {type(parent).__name__} reads its weight without calling it, so that an "
            f"adapter there would do nothing. Exclude it, by `exclude_modules=[{target_name!r}]`."
        )


def has_all_linear_by_default(model: nn.Module) -> bool:
    """Whether `target_modules` defaults to "all-linear": for language models. Others have LoRA's defaults."""
    return isinstance(model, PreTrainedModel) and model.can_generate()


def _is_decoder(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


def flattened_layers(model: nn.Module) -> set[str]:
    """The layers of a decoder that are given (B T, k), by name."""
    return (
        {name for name, use in uses_of_layers(model).layers.items() if use.is_flattened}
        if _is_decoder(model)
        else set()
    )


def refuse_ungateable(model: PreTrainedModel, decoder: Decoder) -> None:
    """Raise a `ValueError` for a decoder whose layers, or what it goes on from, a gated router cannot follow."""
    why = _why_ungateable(model, decoder)
    if why is not None:
        raise ValueError(
            f"A gated `router` cannot follow {type(model).__name__}: {why}. Use `AlterConfig(router='static')`, which "
            "works on any model with linear layers."
        )


def _why_ungateable(model: PreTrainedModel, decoder: Decoder) -> str | None:
    config, uses = model.config.get_text_config(), uses_of_layers(model)
    if config.model_type in UNGATEABLE:
        return UNGATEABLE[config.model_type]
    right = (BATCH, LENGTH, config.hidden_size)
    for name, shape in uses.streams.items():
        if name.rpartition(".")[0] == decoder.path and shape != right:
            return f"its layers are given {shape} for (batch, length, width) = {right}"
    if uses.own_memory is not None:
        return f"it generates from a memory of its own ({uses.own_memory!r}), in which the router's has no place"
    inside = {name for name in uses.layers if name.startswith(f"{decoder.path}.")}
    if inside and inside == set(unfit_layers(model, decoder)):
        return "none of its layers is given one vector for each row and token alone"
    return None


def unfit_layers(model: nn.Module, decoder: Decoder | None) -> dict[str, str]:
    """
    The layers that no adapter can have, by name, and why.

    Args:
        decoder: of a gated router, which adapts its layers alone and needs to know the row and the position of each
            of their inputs; `None` for the static one.
    """
    if not _is_decoder(model):
        return {}
    kernels = READ_BY_KERNELS.get(model.config.get_text_config().model_type, ())
    modules = {name: module for name, module in model.named_modules() if module is not model.get_output_embeddings()}
    unfit = {}
    for name, use in uses_of_layers(model).layers.items():
        if name not in modules or (decoder is not None and not name.startswith(f"{decoder.path}.")):
            continue
        if use.is_read or name.rpartition(".")[2] in kernels:
            unfit[name] = BYPASSED
        elif not use.is_linear:
            unfit[name] = "(returns more than one vector)"
        elif decoder is not None and not (use.shapes and use.learns):
            unfit[name] = UNUSED
        elif decoder is not None and not (use.is_by_token or use.is_flattened):
            shapes = " and ".join(map(str, dict.fromkeys(use.shapes)))
            after = f", {use.next_shapes[0]} for the next one" if use.next_shapes else ""
            unfit[name] = f"(inputs of shape {shapes} where rows and tokens are ({BATCH}, {LENGTH}){after})"
    return unfit


def suit_targets(
    model: nn.Module, config: AlterConfig, decoder: Decoder | None, matches: Callable[[AlterConfig, str], Any]
) -> None:
    """
    Fill in `target_modules`, and leave out of all linear layers what no adapter can have; a line of the log says it.

    Args:
        decoder: as for `unfit_layers`.
        matches: whether a config takes the layer of this name.

    Raises:
        ValueError: the config takes such layers although it names its targets, or no layer can be adapted.
    """
    if config.target_modules is None and has_all_linear_by_default(model):
        config.target_modules = "all-linear"
    by_default = config.target_modules == "all-linear"  # which names no layer
    if config.target_modules is None:
        return
    unfit, asked = unfit_layers(model, decoder), copy.copy(config)
    if by_default:
        asked.target_modules = set(unfit)  # type: ignore[assignment]  # PEFT lists all names later
    short = _short_names(model, unfit)
    taken = [name for name, why in unfit.items() if (by_default or why != UNUSED) and matches(asked, name)]
    if not taken:
        return
    names = {short[name]: unfit[name] for name in taken}
    reasons = "; ".join(
        f"{', '.join(name for name in sorted(names) if names[name] == why)} {why}"
        for why in sorted(set(names.values()))
    )
    if not by_default:
        instead = "" if BYPASSED in names.values() else ", or use `AlterConfig(router='static')`"
        raise ValueError(
            f"`target_modules` takes layers of {type(model).__name__} that cannot be adapted: {reasons}. Exclude "
            f"them, by `exclude_modules={sorted(names)}`{instead}."
        )
    logger.warning("Layers of %s that are left out, as they cannot be adapted: %s.", type(model).__name__, reasons)
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = rf"(?:{config.exclude_modules})|(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *names}  # type: ignore[assignment]


def _short_names(model: nn.Module, unfit: Iterable[str]) -> dict[str, str]:
    """By full name, one that holds in every decoder layer, unless a layer that can be adapted is called so, too."""
    fit = [name for name, _ in model.named_modules() if name not in unfit]
    within = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in unfit}
    return {name: name if any(f.endswith(f".{short}") for f in fit) else short for name, short in within.items()}


def refuse_unsupported(layer: nn.Module, key: str, quantization: dict[str, Any]) -> None:
    """Raise a `ValueError` for a layer that is neither linear nor of a kind that PEFT's quantisations have."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return
    backend = resolve_quantization_backend(layer, **quantization)
    if backend is None or backend.layer_type != "linear":
        raise ValueError(
            f"Target module {key!r} is a {type(layer).__name__}, which ALTER does not support. Restrict "
            "`target_modules` to `torch.nn.Linear` (optionally quantised) and "
            "`transformers.pytorch_utils.Conv1D`; for a quantised layer, install the package that made it."
        )


def resolve_layers(config: AlterConfig, decoder: Decoder) -> None:
    """Fill in `router_layer` and `layers_to_transform`, or raise a `ValueError` if they don't fit the model."""
    depth = len(decoder.layers)
    layers = config.layers_to_transform
    if layers is None:
        layers = list(range(max(config.router_layer or 0, round(ADAPTED_FROM * depth)), depth))
    layers = [layers] if isinstance(layers, int) else list(layers)
    if config.router_layer is None:
        config.router_layer = min(ROUTER_LAYER, depth - 1, *layers)
    first = config.router_layer
    if first >= depth:
        raise ValueError(f"`router_layer` is {first}, but the model has {depth} layers. Set it below {depth}.")
    missing = [layer for layer in layers if layer >= depth]
    if missing:
        raise ValueError(f"`layers_to_transform` contains {missing}, but the model has {depth} layers. Remove them.")
    below = [layer for layer in layers if layer < first]
    if below:
        raise ValueError(
            f"`layers_to_transform` contains {below}, but a gated router adapts no layer below the one that it reads, "
            f"`router_layer`={first}. Remove them or lower `router_layer`."
        )
    config.layers_to_transform = layers


def check_targets(state_dict: dict[str, Tensor], config: AlterConfig, decoder: Decoder) -> None:
    """Raise a `ValueError` if a state dict has its router, or an adapted layer, where the config has none."""
    assert isinstance(config.layers_to_transform, list)
    fix = "Set `router_layer` and `layers_to_transform` to those of the adapter that the state dict is of."
    names = sorted(
        key.removeprefix("base_model.model.").partition(f".{PREFIX}")[0] for key in state_dict if PREFIX in key
    )
    routers = [name for name in names if name.endswith(".token_router")]
    there = f"{decoder.path}.{config.router_layer}.token_router"
    if routers and there not in routers:
        raise ValueError(
            f"`state_dict` has a router on {routers[0]!r}, but `router_layer` is {config.router_layer}. {fix}"
        )
    branch = tuple(f"{decoder.path}.{layer}." for layer in config.layers_to_transform)
    wrong = [name for name in names if name not in routers and not name.startswith(branch)]
    if wrong:
        raise ValueError(
            f"`state_dict` has an adapter on {wrong[0]!r}, but `layers_to_transform` is {config.layers_to_transform}. "
            + fix
        )
