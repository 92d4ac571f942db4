# SPDX-License-Identifier: Apache-2.0
"""Quantisation: does rounding the weights undo the unlearning?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from alter_peft.evaluation.base_weights import base_parameters
from alter_peft.evaluation.copies import copied
from alter_peft.evaluation.metrics import measure
from alter_peft.evaluation.scores import Score
from alter_peft.tuner.config import AlterConfig
from alter_peft.tuner.export import export_to_lora

from .attack import ASKED, Attack, Rows


# bits -> how many weights of a row share a scale (None: all of them)
FORMATS: dict[int, int | None] = {8: None, 4: 64}
MERGED = "merged_quantization"


@torch.no_grad()
def quantize_dequantize(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """
    What is left of a weight after round-to-nearest quantisation: s round(w / s), s = max |w| / (2^(bits-1) - 1).

    Symmetric, so that 0 stays 0. The rounding is torch's own `fake_quantize_per_channel_affine`.

    Args:
        weight: (outputs, inputs).
        bits: of an integer, 2 to 8.
        group_size: how many inputs of an output share a scale; all of them by default. A last group may be smaller.

    Returns:
        The rounded weight, in its own dtype.
    """
    limit = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group_size or weight.shape[1], dim=1):
        scale = (part.abs().amax(dim=1) / limit).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        parts.append(torch.fake_quantize_per_channel_affine(part, scale, zero, 0, -limit, limit))
    return torch.cat(parts, dim=1).to(weight.dtype)


@torch.no_grad()
def quantized(model: Any, bits: int, group_size: int | None = None) -> Any:
    """
    A copy of a model whose linear base weights, but for the head, are rounded; an adapter stays as it is.

    The experts of a mixture that are one 3-D weight count as linear weights, each with scales of its own.

    Args:
        bits, group_size: as for `quantize_dequantize`.

    Raises:
        ValueError: the model has no such weights, was loaded quantised, or has experts of unknown form.
    """
    found = copied(model)
    base: Any = found.get_base_model() if isinstance(found, PeftModel) else found
    head = {id(parameter) for parameter in base.get_output_embeddings().parameters()}
    rounded = {id(parameter) for parameter in base_parameters(found)} - head
    linear = [m for m in base.modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m.weight) in rounded]
    experts = [(weight, turned) for weight, turned in _expert_weights(base) if id(weight) in rounded]
    if not linear:
        raise ValueError(f"`model` is a {type(base).__name__} without linear layers, so there is nothing to quantise.")
    for module in linear:
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        weight.copy_(quantize_dequantize(weight, bits, group_size))
    for weight, turned in experts:
        for expert in weight.transpose(1, 2) if turned else weight:
            expert.copy_(quantize_dequantize(expert, bits, group_size))
    return found


def _expert_weights(base: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """The weights of experts that are kept as one, and whether they are (experts, inputs, outputs), not otherwise."""
    for name, module in base.named_modules():
        if name.replace(".base_layer", "").rpartition(".")[2] != "experts":
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.dim() != 3:
                continue
            if "is_transposed" not in vars(module):
                raise ValueError(
                    f"`model` has the experts {f'{name}.{own}'!r}, a {type(module).__name__}, of which it is not "
                    "known how to round them. Leave the attacks by quantisation out."
                )
            yield weight, vars(module)["is_transposed"]


def quantization(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    metrics: Sequence[str] = ASKED,
    attack: str = "quantization",
) -> list[Score]:
    """
    The forget set, asked of the model with its base weights in each of `FORMATS`: the sets `"forget, 8 bits"`, ...

    References:
        Zhang et al., "Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454.
    """
    scores: list[Score] = []
    for bits, group_size in FORMATS.items():
        rounded = quantized(model, bits, group_size)
        scores += measure(rows.asked(rounded, tokenizer, attack, rows.forget, f"forget, {bits} bits"), metrics)
    return scores


def merged_quantization(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    metrics: Sequence[str] = ASKED,
    expert_weights: Sequence[float] | None = None,
) -> list[Score]:
    """
    As `quantization`, after the adapter is merged into the base. Of a plain model this is `quantization` itself.

    Raises:
        ValueError: as `merged`.
    """
    return quantization(merged(model, expert_weights), tokenizer, rows, metrics, MERGED)


def why_not_merged(model: Any) -> str | None:
    """Why no weights equal the base with its active adapters; `None` if some do, as for a plain model."""
    if not isinstance(model, PeftModel):
        return None
    for name in model.active_adapters:
        config = model.peft_config[name]
        if isinstance(config, AlterConfig) and config.is_gated:
            return f"adapter {name!r} gates every token by itself (`router`={config.router!r}): no weights equal it"
        if config.is_prompt_learning:
            return f"adapter {name!r} ({config.peft_type}) is a prompt, not a change of weights"
    return None


def merged(model: Any, expert_weights: Sequence[float] | None = None) -> Any:
    """
    A plain model: a copy with its adapter merged, if it has one.

    Args:
        expert_weights: fold an ALTER adapter at these omega_1..omega_N, the only way for a gated one.

    Raises:
        ValueError: an adapter that cannot be merged, and no `expert_weights`.
    """
    found = copied(model)
    if not isinstance(found, PeftModel):
        return found
    if expert_weights is not None:
        with tempfile.TemporaryDirectory() as folder:
            export_to_lora(found, folder, found.active_adapter, expert_weights)
            folded = PeftModel.from_pretrained(found.unload(), folder)
        return folded.merge_and_unload()
    reason = why_not_merged(model)
    if reason is not None:
        raise ValueError(f"`model` cannot be merged: {reason}. Fold an ALTER adapter by `expert_weights`.")
    return found.merge_and_unload()


QUANTIZATION = Attack(
    run=quantization, caption="the base weights are rounded to 8 and to 4 bits", packages=("rouge_score",)
)
MERGED_QUANTIZATION = Attack(
    run=merged_quantization,
    caption="the adapter is merged, and the merge is rounded to 8 and to 4 bits",
    needs=("adapter",),
    packages=("rouge_score",),
    left_out=lambda model, rows: {MERGED: reason} if (reason := why_not_merged(model)) else {},
    plain="`quantization` takes the place of this",
    control=lambda key: key._replace(attack="quantization"),
)
