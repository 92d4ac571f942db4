# SPDX-License-Identifier: Apache-2.0
"""Export to a plain LoRA adapter, which stock PEFT and LoRA servers load without this package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from alter_peft.registration import PREFIX

from .config import AlterConfig
from .layer import NO_FIXED_WEIGHT, layers_of
from .saving import one_save
from .values import is_finite_number


def export_to_lora(
    model: PeftModel,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    expert_weights: Sequence[float] | None = None,
) -> None:
    """
    Write an adapter as plain LoRA of the same ranks: lora_A = A, lora_B = B_r + sum_d omega_d B_f^d (Eq. 6).

    Exact for the static router, unlike [`~peft.save_as_lora`], which goes through an SVD. A gated adapter has no fixed
    omega; with `expert_weights` it is folded at those, and then treats all tokens alike (`docs/` shows what that
    loses). Scales of experts count too: one that is off stays off. Trained biases, `modules_to_save` and trained
    embeddings are written beside it. They come into the folder in one step.

    Args:
        model: with the adapter.
        path: a folder, made if need be, for `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: the adapter to write.
        expert_weights: omega_1..omega_N of the forget experts; those of the config by default.

    Raises:
        ValueError: no such ALTER adapter, a gated one without `expert_weights`, or another number of them than of
            forget experts.
    """
    config = _checked(model, adapter_name, expert_weights)
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix): layer for name, layer in layers_of(model, adapter_name).items()}
    state = {
        key: value
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if not any(part.startswith(PREFIX) for part in key.split("."))
    }
    with torch.no_grad():
        for name, layer in layers.items():
            state[f"{prefix}{name}.lora_A.weight"] = layer.alter_A[adapter_name].weight
            state[f"{prefix}{name}.lora_B.weight"] = layer.combined_expert(adapter_name, expert_weights)
    with one_save(Path(path)) as folder:
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        _lora_config(model, config, layers).save_pretrained(str(folder))


def _checked(model: PeftModel, adapter_name: str, expert_weights: Sequence[float] | None) -> AlterConfig:
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, but must be one of {list(model.peft_config)}.")
    config = model.peft_config[adapter_name]
    if not isinstance(config, AlterConfig):
        raise ValueError(f"Adapter {adapter_name!r} is a {type(config).__name__}, but must be an ALTER adapter.")
    if expert_weights is None:
        if config.is_gated:
            raise ValueError(
                f"Adapter {adapter_name!r} gates every token by itself (`router`={config.router!r}), so "
                f"{NO_FIXED_WEIGHT}"
            )
    elif len(expert_weights) != len(config.expert_names) or not all(map(is_finite_number, expert_weights)):
        raise ValueError(
            f"`expert_weights` is {expert_weights!r}, but must be one finite number for each of {config.expert_names}."
        )
    return config


def _lora_config(model: PeftModel, config: AlterConfig, layers: dict[str, Any]) -> LoraConfig:
    """LoRA's config of the same layers, ranks and scales: what both have alike has the same name."""
    shared = {field.name for field in fields(LoraConfig)} & {field.name for field in fields(AlterConfig)}
    arguments = {name: getattr(config, name) for name in shared - {"peft_type"}}
    arguments["inference_mode"] = True  # as PEFT saves every adapter
    arguments["bias"] = config.bias.replace("alter_only", "lora_only")
    # so that LoRA need not set it by itself, with a warning
    arguments["fan_in_fan_out"] = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    named = {**arguments, "target_modules": list(layers), "layers_to_transform": None, "layers_pattern": None}
    if isinstance(config.target_modules, str):
        return LoraConfig(**named)
    inside = tuple(f"{name}." for name in layers)
    names = [name for name, _ in model.get_base_model().named_modules() if not name.startswith(inside)]
    lora = LoraConfig(**arguments)
    # a router restricts the layers beyond what LoRA would match by name and index
    if {name for name in names if check_target_module_exists(lora, name)} == set(layers):
        return lora
    return LoraConfig(**named)
