# SPDX-License-Identifier: Apache-2.0
"""How a model that is measured is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(folder: Path | str) -> PreTrainedModel:
    """A model in float32, in which small steps are not lost, on this process's own device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(PartialState().device).eval()  # type: ignore[no-any-return]


def loaded(name: str, source: str, read: Callable[[str], Any]) -> Any:
    """What option `name` is read as, from a folder or the Hub; a `ValueError` if it can't be."""
    try:
        return read(source)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{name}` is {source!r}, which could not be loaded ({error}). Give a folder or a Hub id."
        ) from error
