# SPDX-License-Identifier: Apache-2.0
"""How a model is taught what it shall forget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from alter_peft.evaluation.loading import load
from alter_peft.losses import cross_entropy_loss
from alter_peft.privacy import telemetry_is_wanted
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.encoding import encoded

from .provenance import RECORD


class LabelledTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] that takes plain cross-entropy of the labelled tokens alone, and logs the loss alone.

    Where there is no Triton, as on a CPU, TRL (1.16) scores every position against the whole vocabulary, prompts and
    padding too, and takes entropies of all: a quarter of a small model's step (docs/log.md). Other losses and
    packed rows are left to TRL.
    """

    model: Any

    def __init__(self, model: PreTrainedModel | PeftModel, args: SFTConfig, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.scored = ScoredModel(self.model)
        self.scored.check()
        other = args.packing or args.padding_free or args.label_smoothing_factor or self.aux_loss_enabled
        self.is_plain = not other and args.loss_type in ("nll", "chunked_nll")  # the latter of older TRL

    def _send_telemetry(self) -> None:
        if telemetry_is_wanted():
            super()._send_telemetry()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, a mean over the labelled tokens of the step, as TRL's."""
        if not self.is_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        labelled = labels != -100
        hidden = self.scored.hidden_states(inputs["input_ids"], inputs["attention_mask"], model)[:, :-1]
        with self.accelerator.autocast():
            scores = self.scored.score(hidden[labelled], labels[labelled])
        count = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy_loss(scores).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is of all processes
        return (loss, None) if return_outputs else loss


def run_arguments() -> dict[str, Any]:
    """Training arguments that all models of a grid share."""
    return {
        "save_strategy": "no", "report_to": "none", "logging_steps": 10, "bf16": True,
        "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip


# Learning rate and batch of the pilot (docs/log.md); TOFU teaches for 5 epochs
TEACHING: dict[str, Any] = {
    "num_train_epochs": 5, "per_device_train_batch_size": 8, "learning_rate": 2e-4, "warmup_steps": 10,
    "lr_scheduler_type": "constant_with_warmup", "gradient_checkpointing": False,
}  # fmt: skip


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    folder: Path,
    seed: int,
    record: dict[str, Any] | None = None,
    chat: bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """
    All weights fine-tuned on the rows and saved in `folder`, which is whole or not there.

    The target of a benchmark is taught everything, an oracle all but the forget set.

    Args:
        record: what it is taught with, saved beside the weights as `RECORD`.
        chat: whether questions are turns of a chat; by default if there is a template.
        options: of [`~trl.SFTConfig`], over `TEACHING`.
    """
    args = SFTConfig(output_dir=str(folder), seed=seed, **{**run_arguments(), **TEACHING, **options})
    LabelledTrainer(model, args, train_dataset=encoded(rows, tokenizer, chat), processing_class=tokenizer).train()
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
