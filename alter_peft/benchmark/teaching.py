# SPDX-License-Identifier: Apache-2.0
"""How a model is taught what it shall forget."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from alter_peft.losses import cross_entropy_loss
from alter_peft.scoring import ScoredModel


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
