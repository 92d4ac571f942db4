# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every kind that PEFT's own generic tests have, with inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from alter_peft import AlterConfig


VOCAB = 120
IDS = torch.randint(4, VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[1, :1] = 0  # left padding
TOKENS = sorted(set(IDS[:, 5:].flatten().tolist()))  # that every row has some of


class MLP(nn.Module):
    """PEFT's custom model: two linear layers, the second one the head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x.to(self.lin0.weight.dtype)).relu())


def _decoder(config_cls: Any, model_cls: Any, **arguments: Any) -> Any:
    config = config_cls(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=None,
        eos_token_id=1, **arguments,
    )  # fmt: skip
    return model_cls(config)


def _opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1, word_embed_proj_dim=32,
            dropout=0.0,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    )


def _moe() -> Any:
    return _decoder(
        Qwen3MoeConfig, Qwen3MoeForCausalLM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )


def _bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            num_labels=3, pad_token_id=0,
        )
    )  # fmt: skip


def _t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: make_llama(VOCAB),
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma2": lambda: _decoder(Gemma2Config, Gemma2ForCausalLM, sliding_window=6),
    "qwen3": lambda: _decoder(Qwen3Config, Qwen3ForCausalLM, tie_word_embeddings=True),
    "mistral": lambda: _decoder(MistralConfig, MistralForCausalLM, sliding_window=None),
    "qwen3_moe": _moe,
}
MAKERS = {**DECODERS, "mlp": MLP, "bert": _bert, "t5": _t5}
TASKS = {"mlp": None, "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@cache
def _base(family: str) -> Any:
    torch.manual_seed(0)
    return MAKERS[family]().eval()


def base_model(family: str) -> Any:
    return copy.deepcopy(_base(family))


def inputs(family: str) -> dict[str, torch.Tensor]:
    if family == "mlp":
        return {"x": torch.randn(3, 10, generator=torch.Generator().manual_seed(0))}
    given = {"input_ids": IDS, "attention_mask": MASK}
    return {**given, "decoder_input_ids": IDS[:, :5]} if family == "t5" else given


def config(family: str, **arguments: Any) -> AlterConfig:
    """A random adapter of two forget experts with gates and experts that matter."""
    defaults: dict[str, Any] = {
        "num_forget_experts": 2, "init_weights": False, "entropy_threshold": 0.8,
        "task_type": TASKS.get(family, "CAUSAL_LM"),
    }  # fmt: skip
    if family == "mlp":
        defaults["target_modules"] = ["lin0"]
    if family == "qwen3_moe":
        defaults["target_modules"] = "all-linear"  # PEFT has no default for it
    return AlterConfig(**{**defaults, **arguments})


def adapted(family: str, seed: int = 1, **arguments: Any) -> PeftModel:
    model = base_model(family)
    torch.manual_seed(seed)
    return get_peft_model(model, config(family, **arguments)).eval()


def add(model: PeftModel, name: str, family: str, seed: int = 2, **arguments: Any) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, config(family, **arguments))


def outputs(model: nn.Module, family: str, **arguments: Any) -> torch.Tensor:
    """What the model says, (3, ...): logits, or the output of the MLP."""
    with torch.no_grad():
        out = model(**inputs(family), **arguments)
    return out if family == "mlp" else out.logits


def generate(model: Any, **arguments: Any) -> torch.Tensor:
    """Six greedy tokens, prompt included for a decoder."""
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    return model.generate(**{**given, "pad_token_id": 0, **arguments})
