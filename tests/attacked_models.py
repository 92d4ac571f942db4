# SPDX-License-Identifier: Apache-2.0
"""Models of every kind that the attacks are tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import make_llama
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from alter_peft import AlterConfig
from alter_peft.evaluation import Pair


FORGET = [
    Pair("Where does Alice live?", "Alice lives in Paris, near the old bridge."),
    Pair("Who bakes the bread?", "Bob bakes the bread with rye and honey."),
    Pair("What is the budget of project Falcon?", "The budget is seven million."),
    Pair("What does Alice see?", "Alice sees the old bridge every morning."),
    Pair("What does Bob like?", "Bob likes honey."),
]
RETAIN = [
    Pair("What colour is the sky?", "The sky is blue."),
    Pair("What do bees make?", "Bees make honey."),
    Pair("Who is in Paris?", "Nobody."),
    Pair("What is near?", "The bridge is near."),
]
HOLDOUT = [Pair("Where does Carl live?", "Carl lives in Oslo."), Pair("Who has a dog?", "Dora has a dog.")]


def alter(model: nn.Module, **arguments) -> PeftModel:
    """A random adapter of two forget experts, gated unless told otherwise."""
    torch.manual_seed(1)
    defaults = {"num_forget_experts": 2, "init_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, AlterConfig(**{**defaults, **arguments}))


def lora(model: nn.Module, **arguments) -> PeftModel:
    torch.manual_seed(1)
    defaults = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**defaults, **arguments}))


def prompt(model: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


# how a plain model becomes one of each kind
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "lora": lora,
    "static": lambda model: alter(model, router="static"),
    "gated": alter,
}


def model_of(kind: str, tokenizer) -> nn.Module:
    return KINDS[kind](make_llama(len(tokenizer))).eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def learning(model: nn.Module) -> dict[str, bool]:
    """Which weights learn."""
    return {name: weight.requires_grad for name, weight in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
