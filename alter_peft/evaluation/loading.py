# SPDX-License-Identifier: Apache-2.0
"""How a model that is measured is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(folder: Path | str) -> PreTrainedModel:
    """A model in float32, in which small steps are not lost, on this process's own device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(PartialState().device).eval()  # type: ignore[no-any-return]


def loaded(name: str, source: str, read: Callable[[str], Any]) -> Any:
    """What option `name` is read as, from a folder or the Hub; a `ValueError` if it can't be."""
    try:
        return read(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` is {source!r}, which could not be loaded ({error}). Give a folder or a Hub id."
        ) from error


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer that an adapter was trained with, if it is beside it, or else the model's.

    Its chat template may have variables of the training's (`chat_template_kwargs`).
    """
    if adapter is not None and (not Path(adapter).is_dir() or (Path(adapter) / "tokenizer_config.json").is_file()):
        try:
            return AutoTokenizer.from_pretrained(adapter)
        except (OSError, ValueError):
            pass  # an adapter of the Hub that has none
    return loaded("model", model, AutoTokenizer.from_pretrained)  # type: ignore[no-any-return]
