# SPDX-License-Identifier: Apache-2.0
"""How a model that is measured is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(folder: Path | str) -> PreTrainedModel:
    """A model in float32, in which small steps are not lost, on this process's own device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(PartialState().device).eval()  # type: ignore[no-any-return]
