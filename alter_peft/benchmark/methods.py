# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: how a model is taught what it shall forget, and the methods that make it forget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from alter_peft.options import check_counts, parse_values
from alter_peft.trainer import AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.trainer.inputs import as_chat
from alter_peft.tuner import AlterConfig

from .baselines import LabelledTrainer, LoraUnlearnTrainer
from .provenance import RECORD


class Task(NamedTuple):
    """
    What a method is given.

    forget, retain: rows as [`AlterUnlearnTrainer`] takes them.
    calibration: text like the forget rows that was never trained on, for the methods that can use it.
    """

    forget: Dataset
    retain: Dataset
    calibration: Dataset | None = None


# Learning rate and batch of the pilot (docs/log.md); TOFU teaches for 5 epochs
TEACHING: dict[str, Any] = {
    "num_train_epochs": 5, "per_device_train_batch_size": 8, "learning_rate": 2e-4, "warmup_steps": 10,
    "lr_scheduler_type": "constant_with_warmup", "gradient_checkpointing": False,
}  # fmt: skip
# The paper's own loss and epochs (arXiv 2603.01792), with our router
PAPER: dict[str, Any] = {"forget_loss": "paper", "num_train_epochs": 3}
# TOFU unlearns for 5 epochs; the learning rate is the pilot's, nothing else is tuned
LORA: dict[str, Any] = {
    "num_train_epochs": 5, "per_device_train_batch_size": 4, "learning_rate": 5e-4, "gradient_checkpointing": False,
}  # fmt: skip


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    folder: Path,
    seed: int,
    record: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """
    All weights fine-tuned on the rows and saved in `folder`, which is whole or not there.

    The target of a benchmark is taught everything, an oracle all but the forget set.

    Args:
        record: what it is taught with, saved beside the weights as `RECORD`.
        options: of [`~trl.SFTConfig`], over `TEACHING`.
    """
    args = SFTConfig(output_dir=str(folder), seed=seed, **{**_quiet(), **TEACHING, **options})
    LabelledTrainer(model, args, train_dataset=as_chat(rows, None, tokenizer), processing_class=tokenizer).train()
    state = PartialState()
    if state.is_main_process:
        partial_folder = folder.with_suffix(".partial")
        model.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)
        if record is not None:
            (partial_folder / RECORD).write_text(json.dumps(record, indent=1))
        partial_folder.replace(folder)
    state.wait_for_everyone()
    return load(folder)


def load(folder: Path | str) -> PreTrainedModel:
    """A model in float32, in which small steps are not lost, on this process's own device."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(PartialState().device).eval()  # type: ignore[no-any-return]


def _quiet() -> dict[str, Any]:
    """Training arguments that all methods share."""
    return {
        "save_strategy": "no", "report_to": "none", "logging_steps": 10, "bf16": True,
        "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


# What a cell rests on: checkpoints would stand in the way of what is saved, and there are no rows for an evaluation
OWN = {"output_dir", "seed", "save_strategy", "eval_strategy", "report_to", "push_to_hub"}


def read_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    Options of the training of a method as the fields of its configuration take them.

    Args:
        name: of `METHODS`, or `"teach"`.

    Raises:
        ValueError: an option that is not known, is the benchmark's own, or has a value that is of no use.
    """
    config = AlterUnlearnConfig if name.startswith(("alter", "asymlora")) else SFTConfig
    taken = sorted(OWN & options.keys())
    if taken:
        raise ValueError(f"`options` has {taken} for {name!r}, which the benchmark sets itself. Remove them.")
    unknown = sorted(set(options) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"`options` has {unknown} for {name!r}, but those must be fields of {config.__name__}.")
    try:
        found = parse_values(config, options)
        args = config(output_dir="", **{**_quiet(), **found})
        check_counts(args, ("per_device_train_batch_size", "gradient_accumulation_steps"))
        if not args.learning_rate >= 0:
            raise ValueError(f"`learning_rate` is {args.learning_rate}, but must be 0 or more.")
        if not args.num_train_epochs > 0:
            raise ValueError(f"`num_train_epochs` is {args.num_train_epochs}, but must be above 0.")
        if args.max_steps < 1 and args.max_steps != -1:
            raise ValueError(f"`max_steps` is {args.max_steps}, but must be 1 or more, or -1 for whole epochs.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`options` for {name!r} are {options}, which {config.__name__} refuses: {error}") from error
    return found


def _alter(
    router: str,
    own: dict[str, Any],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    folder: Path,
    seed: int,
    options: dict[str, Any],
) -> PeftModel:
    config = AlterConfig(router=router)
    if isinstance(model, PeftModel):  # an earlier request's: this one gets an adapter of its own
        name = f"request_{len(model.peft_config)}"
        earlier = list(model.peft_config)
        model.add_adapter(name, config)
        tuner: Any = model.base_model
        tuner.set_adapter([name, *earlier])  # trained as it will be asked, beside the earlier ones
    trainer = AlterUnlearnTrainer(
        model,
        AlterUnlearnConfig(output_dir=str(folder), seed=seed, **{**_quiet(), **own, **options}),
        train_dataset=task.forget,
        retain_dataset=task.retain,
        calibration_dataset=task.calibration,
        peft_config=None if isinstance(model, PeftModel) else config,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.model.base_model.set_adapter(list(trainer.model.peft_config), inference_mode=True)
    return trainer.model  # type: ignore[no-any-return]


def _lora(
    forget_loss: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    folder: Path,
    seed: int,
    options: dict[str, Any],
) -> PeftModel:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if isinstance(model, PeftModel):  # an earlier request's, which is frozen if it was loaded
        model.set_adapter(model.active_adapter)
    trainer = LoraUnlearnTrainer(
        model,
        SFTConfig(output_dir=str(folder), seed=seed, **{**_quiet(), **LORA, **options}),
        forget_loss=forget_loss,
        train_dataset=task.forget,
        retain_dataset=task.retain,
        peft_config=None if isinstance(model, PeftModel) else config,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.model  # type: ignore[no-any-return]


# (model, tokenizer, task, folder, seed, options of the training) -> the model with an adapter, saved in `folder`.
# To what an earlier request left, ALTER adds an adapter for this one, while LoRA trains its adapter on.
Method = Callable[[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, Task, Path, int, dict[str, Any]], PeftModel]
METHODS: dict[str, Method] = {
    "alter": partial(_alter, "context", {}),
    "alter_profile": partial(_alter, "context", {"forget_loss": "profile"}),
    "alter_paper": partial(_alter, "context", PAPER),
    "asymlora": partial(_alter, "static", {}),
    "lora_ihl": partial(_lora, "ihl"),
    "lora_ga": partial(_lora, "ga"),
    "lora_npo": partial(_lora, "npo"),
    "lora_simnpo": partial(_lora, "simnpo"),
}
