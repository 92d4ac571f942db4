# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from attacked_models import KINDS, lora, prompt
from conftest import make_llama
from peft import IA3Config, get_peft_model
from torch import nn

from alter_peft.evaluation.base_weights import base_parameters


OTHERS = {
    "modules_to_save": lambda model: lora(
        model,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        ensure_weight_tying=model.config.tie_word_embeddings,
    ),
    "trainable_tokens": lambda model: lora(model, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "ia3": lambda model: get_peft_model(model, IA3Config(task_type="CAUSAL_LM")),
    "prompt": prompt,
    "two adapters": lambda model: (two := lora(model)).add_adapter("second", two.peft_config["default"]) or two,
}


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_they_are_those_of_the_model_before_it_was_adapted(kind, tied):
    model = make_llama(64, tie_word_embeddings=tied)
    before = {id(parameter) for parameter in model.parameters()}
    adapted = {**KINDS, **OTHERS}[kind](model)
    found = [id(parameter) for parameter in base_parameters(adapted)]
    assert len(found) == len(before) and set(found) == before
    assert kind == "plain" or len(list(adapted.parameters())) > len(before)


def test_integer_weights_are_named():
    model = make_llama(64)
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj.weight' of torch.int8"):
        base_parameters(model)
