# SPDX-License-Identifier: Apache-2.0
"""What is asked of every decoder family: one function a promise, which raises or returns what was found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_families import VOCAB, tiny_model
from torch import Tensor, nn
from trainer_setup import adapter_state, make_trainer

from alter_peft import AlterConfig
from alter_peft.tuner.layer import AlterLinear


IDS = torch.randint(4, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
CLOSE = 0.01  # of the logits' standard deviation


def gated(base: nn.Module, **arguments: Any) -> PeftModel:
    """A random adapter of two forget experts with the default targets."""
    torch.manual_seed(1)
    config = {"num_forget_experts": 2, "init_weights": False, "task_type": "CAUSAL_LM", **arguments}
    return get_peft_model(base, AlterConfig(**config)).eval()


def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()


def gap(found: Tensor, expected: Tensor) -> float:
    """The greatest difference in standard deviations of the logits."""
    return float((found - expected).abs().max() / expected.std())


def padded(model: nn.Module) -> float:
    """How much a row's logits move by two tokens of padding on the left and a neighbour."""
    ids = IDS[:2].clone()
    ids[0, :2] = 0
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[2], [0]])).long()
    return gap(logits(model, ids, mask)[0, 2:], logits(model, ids[:1, 2:])[0])


def beside_neighbours(model: nn.Module) -> float:
    return gap(logits(model)[:1], logits(model, IDS[:1]))


def generated(model: nn.Module, **options: Any) -> Tensor:
    defaults = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **{**defaults, **options})


def with_a_cache(model: nn.Module) -> bool:
    return torch.equal(generated(model), generated(model, use_cache=False))


def felt(model: PeftModel) -> list[str]:
    """The adapted layers whose experts alone do not change the logits."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AlterLinear)}
    weights = {name: copy.deepcopy(layer.alter_B.state_dict()) for name, layer in layers.items()}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.alter_B.parameters():
                parameter.zero_()
        base, unfelt = logits(model), []
        for name, layer in layers.items():
            layer.alter_B.load_state_dict({key: 50 * value for key, value in weights[name].items()})
            if gap(logits(model), base) < 1e-6:
                unfelt.append(name)
            layer.alter_B.load_state_dict({key: 0 * value for key, value in weights[name].items()})
        for name, layer in layers.items():
            layer.alter_B.load_state_dict(weights[name])
    return unfelt


def saved_and_loaded(model: PeftModel, family: str, folder: Path) -> float:
    model.save_pretrained(folder)
    return gap(logits(PeftModel.from_pretrained(tiny_model(family), folder).eval()), logits(model))


def trained(family: str, tokenizer: Any, folder: Path) -> bool:
    trainer = make_trainer(folder, tokenizer, model=tiny_model(family), adapter={}, max_steps=3)
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    return all(value.isfinite().all() for value in after.values()) and any(".forget_" in name for name in moved)
