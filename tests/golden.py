# SPDX-License-Identifier: Apache-2.0
"""Golden adapters: what each format version looks like on disk, and what the adapters in it say.

`python tests/golden.py` writes those of the present `FORMAT_VERSION` to tests/fixtures/format-<version>/. Those of a
released version are never written again: they stand for the adapters that users have.

All weights are a formula of their names' order, so that no random number generator and no base model is stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alter_peft import AlterConfig
from alter_peft.tuner.files import FORMAT_VERSION


FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = torch.tensor([[1, 4, 9, 3, 14, 2], [7, 7, 5, 0, 11, 8]])
ADAPTERS: dict[str, dict[str, Any]] = {
    "gated": {
        "domains": ["person", "recipe"], "router_layer": 1, "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}, "entropy_threshold": 0.7,
        "inference_entropy": "base", "router_hidden_size": 0, "router_half_life": 8.0,
    },
    "hidden": {
        "domains": ["person", "recipe"], "router_layer": 1, "target_modules": ["v_proj", "up_proj"],
        "router_hidden_size": 5, "router_half_life": 3.0, "temperature_low": 1.0,
    },
    "static": {
        "router": "static", "expert_weights": [0.5, 2.0], "target_modules": ["v_proj", "up_proj"], "use_rslora": True,
        "modules_to_save": ["lm_head"],
    },
    "entropy": {
        "router": "entropy", "domains": ["person", "recipe"], "router_layer": 1, "target_modules": ["o_proj"],
        "entropy_threshold": 0.5, "temperature_low": 0.3,
    },
}  # fmt: skip
FIRST_VERSION = {"hidden": 3}  # format that an adapter needs


def fill(named: list[tuple[str, nn.Parameter]], scale: float) -> None:
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(named)):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = scale * torch.sin(0.7 * (index + 1) + steps * (1.3 + 0.1 * index))
            parameter.copy_(values.reshape(parameter.shape))


def make_base() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    fill(list(model.named_parameters()), 0.8)
    return model


def logits(model: PeftModel) -> list[Any]:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.tolist()


def write(folder: Path) -> None:
    for name, options in ADAPTERS.items():
        model = get_peft_model(make_base(), AlterConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)).eval()
        tuned = ("alter_", "modules_to_save")
        fill([(key, value) for key, value in model.named_parameters() if any(part in key for part in tuned)], 0.6)
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        (folder / name / "logits.json").write_text(json.dumps(logits(model)) + "\n")


if __name__ == "__main__":
    write(FIXTURES / f"format-{FORMAT_VERSION}")
