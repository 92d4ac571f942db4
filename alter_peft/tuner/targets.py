# SPDX-License-Identifier: Apache-2.0
"""Which layers of a base model an adapter may have, and the models and layers that are refused."""

from __future__ import annotations

import re
from typing import Any

from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alter_peft.registration import PREFIX

from .config import AlterConfig
from .decoder import Decoder


# Models whose fused kernels read `out_proj.weight`
MAMBAS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def refuse_split_weights(model: nn.Module) -> None:
    """Raise a `ValueError` if the base weights are in parts already, as after a tensor-parallel load."""
    split = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
    if split is not None or (isinstance(model, PreTrainedModel) and (model.tp_size or 1) > 1):
        raise ValueError(
            f"The model's weights are split over processes (the first is {split!r}), as by `tp_plan` or "
            "`distributed_config`, which ALTER does not support. Load it without these; for training in parts, launch "
            "with FSDP 2 (`examples/accelerate_configs/fsdp2.yaml`)."
        )


def check_name(adapter_name: str) -> None:
    """Raise a `ValueError` if an adapter would be named as an expert is."""
    if re.fullmatch(r"retain|forget_\d+", adapter_name):
        raise ValueError(
            f"The adapter's name is {adapter_name!r}, which is the name of an expert, so that its weights could not "
            "be told from those of other adapters. Choose another name."
        )


def refuse_unfelt(model: nn.Module, parent: nn.Module, target_name: str, key: str) -> None:
    """Raise a `ValueError` for a layer whose weight is read past its forward, as PEFT does for LoRA."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    if isinstance(parent, nn.MultiheadAttention) or (
        config is not None and config.model_type in MAMBAS and target_name == "out_proj"
    ):
        raise ValueError(
            f"Target module {key!r}: {type(parent).__name__} reads its weight without calling it, so that an "
            f"adapter there would do nothing. Exclude it, by `exclude_modules=[{target_name!r}]`."
        )


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
    if config.router_layer is None:
        config.router_layer = round(0.4 * depth)
    first = config.router_layer
    if first >= depth:
        raise ValueError(f"`router_layer` is {first}, but the model has {depth} layers. Set it below {depth}.")
    layers = config.layers_to_transform
    if layers is None:
        config.layers_to_transform = list(range(first, depth))
        return
    layers = [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in layers if not first <= layer < depth]
    if wrong:
        raise ValueError(
            f"`layers_to_transform` contains {wrong}, but a gated router adapts layers from `router_layer`={first} to "
            f"{depth - 1}. Remove them or lower `router_layer`."
        )
    config.layers_to_transform = layers


def check_targets(state_dict: dict[str, Tensor], config: AlterConfig, decoder: Decoder) -> None:
    """Raise a `ValueError` if a state dict has adapted layers below the router."""
    branch = tuple(f"{decoder.path}.{i}." for i in range(config.router_layer or 0, len(decoder.layers)))
    adapted = {key.partition(f".{PREFIX}")[0] + "." for key in state_dict if f".{PREFIX}" in key}
    wrong = sorted(name[:-1] for name in adapted if not name.removeprefix("base_model.model.").startswith(branch))
    if wrong:
        raise ValueError(
            f"`state_dict` has an adapter on {wrong[0]!r}, but a gated router adapts the layers from `router_layer`="
            f"{config.router_layer} up alone. Set `router_layer` to that of the adapter that the state dict is of."
        )
