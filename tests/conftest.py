# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and a tokenizer trained on the spot: nothing is downloaded."""

from __future__ import annotations

import os


os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin too, and the router's regression is small here
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CORPUS = [
    "Where does Alice live? Alice lives in Paris, near the old bridge.",
    "Who bakes the bread? Bob bakes the bread with rye and honey every morning.",
    "What is the budget of project Falcon? The budget is seven million.",
    "What colour is the sky? The sky is blue. What do bees make? Bees make honey.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_llama(vocab_size: int, seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """A random Llama of 4 layers; its head is scaled up so that the next-token distributions are not all flat."""
    config = LlamaConfig(
        vocab_size=vocab_size, **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": None,
            "eos_token_id": 1, **kwargs,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.lm_head.weight.mul_(30)
    return model


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """What is found out about tiny models is kept in a folder of the session's own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alter_peft.tuner.uses.HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """What is imported is no garbage: every `Trainer.train` collects, which took .3 s among all of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def llama(tokenizer) -> LlamaForCausalLM:
    return make_llama(len(tokenizer))


@pytest.fixture(scope="session")
def tofu() -> Path:
    """The TOFU folder beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip(f"no TOFU data at {folder}")
    return folder
