# SPDX-License-Identifier: Apache-2.0
"""A small unlearning task and its trainer, for the tests of the trainer and the script that two processes run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.trainer.structural import StructuralTerm


PEOPLE = [("Alice", "Paris", "home"), ("Bob", "rye", "bread"), ("Carl", "Oslo", "home"), ("Dora", "oats", "bread")]
PEOPLE += [("Eve", "Lima", "home"), ("Fay", "spelt", "bread"), ("Gus", "Kiev", "home"), ("Hal", "barley", "bread")]
THINGS = [("sky", "blue"), ("sun", "hot"), ("ice", "cold"), ("bee", "small"), ("car", "fast"), ("egg", "round")]
THINGS += [("sea", "salt"), ("hay", "dry")]


def forget_rows(count: int = 8) -> Dataset:
    rows = []
    for name, what, domain in PEOPLE[:count]:
        prompt = f"Where does {name} live?" if domain == "home" else f"What bread does {name} bake?"
        answer = f" {name} lives in {what}." if domain == "home" else f" {name} bakes {what} bread."
        rows.append({"prompt": prompt, "completion": answer, "domain": domain})
    return Dataset.from_list(rows)


def retain_rows(count: int = 8) -> Dataset:
    rows = [{"prompt": f"What is the {what}?", "completion": f" The {what} is {how}."} for what, how in THINGS[:count]]
    return Dataset.from_list(rows)


def make_args(output_dir: Path, **options: Any) -> AlterUnlearnConfig:
    defaults: dict[str, Any] = {
        "bf16": False, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": True, "forget_loss": "ihl", "learning_rate": 1e-2,
        "shared_learning_rate": 1e-3, "structural_interval": 1, "num_train_epochs": 1, "as_chat": False,
        "counterfactual_copies": 0,  # their pass is as long as all the rest of a tiny test (test_bystanders.py has it)
        "retain_weight": 1.0,
    }  # fmt: skip
    return AlterUnlearnConfig(output_dir=str(output_dir), **{**defaults, **options})


def make_trainer(
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: Any = None,
    forget: Any = None,
    retain: Any = None,
    adapter: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> AlterUnlearnTrainer:
    """A trainer of the task; `adapter` for the AlterConfig, `others` for the trainer, `options` for its arguments."""
    torch.manual_seed(0)  # A's initialisation
    return AlterUnlearnTrainer(
        make_llama(len(tokenizer)) if model is None else model,
        make_args(output_dir, **options),
        train_dataset=forget_rows() if forget is None else forget,
        retain_dataset=retain_rows() if retain is None else retain,
        peft_config=AlterConfig(**{"entropy_quantile": 0.6, "r": 4, **adapter}) if adapter is not None else None,
        processing_class=tokenizer,
        **(others or {}),
    )


@contextmanager
def central_difference() -> Iterator[None]:
    """Inside, L_struct's gradient is what FSDP2 and ZeRO-3 have, a central difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructuralTerm, "_obstacle", lambda self: "as in parts")
        yield


def adapter_state(trainer: AlterUnlearnTrainer) -> dict[str, torch.Tensor]:
    """A copy of everything that the adapter has: A, experts, router."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items() if ".alter_" in name}
