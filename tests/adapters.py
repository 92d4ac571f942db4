# SPDX-License-Identifier: Apache-2.0
"""What the tests of base models, compilation and serving share: random adapters on tiny random models."""

from __future__ import annotations

import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from torch import nn

from alter_peft import AlterConfig
from alter_peft.tuner.layer import AlterLinear


VOCAB = 120
# 3 rows, the first two padded on the left
IDS = torch.randint(4, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[1, :1] = 0
ROUTERS = [{"inference_entropy": "none"}, {"inference_entropy": "base"}]
ROUTER_IDS = ["context", "context-base"]
# an adapted Llama's arguments, and those of its relatives
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip


def config(**arguments) -> AlterConfig:
    defaults = {"num_forget_experts": 2, "init_weights": False, "entropy_threshold": 0.8, "task_type": "CAUSAL_LM"}
    return AlterConfig(**{**defaults, "target_modules": "all-linear", **arguments})


def sharpened(model: nn.Module) -> nn.Module:
    """A random head of large weights, untied: next tokens that differ, by margins above the rounding."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5)))
    return model.eval()


def adapt(model: nn.Module, gain: float = 1.0, **arguments) -> PeftModel:
    """A random adapter, its experts multiplied by `gain`."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, config(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".alter_B." in name:
                parameter.mul_(gain)
    return adapted


def llama(gain: float = 1.0, **arguments) -> PeftModel:
    return adapt(make_llama(VOCAB), gain, **arguments)


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS, "attention_mask": MASK})).logits


def generated(model: nn.Module, **options) -> torch.Tensor:
    """12 new tokens a row, greedy unless told otherwise."""
    defaults = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(**{**defaults, "eos_token_id": None, **options})


def context_of(model: nn.Module):
    return next(module.context for module in model.modules() if isinstance(module, AlterLinear))
