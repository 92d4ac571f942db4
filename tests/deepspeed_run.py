# SPDX-License-Identifier: Apache-2.0
"""What two processes run for tests/test_deepspeed.py: `accelerate launch ... deepspeed_run.py FOLDER`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn
from trainer_setup import adapter_state, forget_rows, make_args, retain_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alter_peft import AlterUnlearnTrainer, scoring
from alter_peft.losses import score_tokens, score_tokens_and_others


# AdamW moves an expert that no row teaches, unless it is let rest. A step takes two pairs: one process a batch of 2,
# two processes 1 each. DeepSpeed clips by one norm over all, so nothing is clipped
TRAJECTORY: dict[str, Any] = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "structural_interval": 3, "max_grad_norm": 0.0,
    "num_train_epochs": 2, "retain_loss": "kl", "per_device_train_batch_size": 2,
    "gradient_checkpointing": True,
}  # fmt: skip


def trainer_from(start: Path, output_dir: Path, tokenizer: Any, **options: Any) -> AlterUnlearnTrainer:
    """A trainer of the base model and the adapter in a folder, which ZeRO-3 splits while they are loaded."""
    args = make_args(output_dir, **{**TRAJECTORY, **options})  # before the model, which has to know of ZeRO-3
    base = AutoModelForCausalLM.from_pretrained(start / "base")
    model = PeftModel.from_pretrained(base, start / "start", is_trainable=True)
    return AlterUnlearnTrainer(
        model, args, train_dataset=forget_rows(), retain_dataset=retain_rows(4), processing_class=tokenizer,
        calibration_dataset=retain_rows().select(range(4, 8)),
    )  # fmt: skip


def train_and_save(trainer: AlterUnlearnTrainer, place: Path, **kwargs: Any) -> None:
    trainer.train(**kwargs)
    trainer.save_model(place)
    gap = trainer._mean_gap(64)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(place / "state.json")
        (place / "gap.txt").write_text(str(gap))


def started_from_clusters(trainer: AlterUnlearnTrainer) -> dict[str, torch.Tensor]:
    """The adapter and the targets after phase I, which fits the router and starts the experts: both begin at zero."""
    for name, parameter in trainer.model.named_parameters():
        if ".alter_B." in name or ".alter_router." in name:
            nn.init.zeros_(parameter)
    trainer.alter_config.init_weights = "cluster"
    trainer.prepare()
    return {**adapter_state(trainer), "targets": trainer.measured.targets}


def router_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".alter_router." in name}


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile first
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    # so small that the processes have different numbers of chunks
    scoring.score_tokens = functools.partial(score_tokens, chunk_size=5)  # type: ignore[assignment]
    scoring.score_tokens_and_others = functools.partial(  # type: ignore[assignment]
        score_tokens_and_others, chunk_size=5
    )
    make = functools.partial(
        trainer_from, folder.parent, tokenizer=tokenizer, use_cpu=False, per_device_train_batch_size=1
    )

    trainer = make(folder / "whole", save_strategy="steps", save_steps=3)
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    assert trainer.accelerator.num_processes == 2 and folder.name == f"zero{stage}"
    split = [
        hasattr(parameter, "ds_id") for name, parameter in trainer.model.named_parameters() if "alter_" not in name
    ]
    assert all(split) if stage == 3 else not any(split)
    assert not trainer._begins_as_base  # its experts have learned, also where no process holds them whole
    train_and_save(trainer, folder / "trajectory")
    checkpoint = str(folder / "whole-checkpoints" / "checkpoint-3")
    train_and_save(make(folder / "rest"), folder / "rest-adapter", resume_from_checkpoint=checkpoint)

    trainer = make(folder / "bf16", bf16=True, structural_interval=1, max_steps=1)
    trainer.prepare()
    assert (trainer.structural_weight > 0) == (stage == 2)  # ZeRO-3 has a central difference alone
    before = {name: value.clone() for name, value in router_of(trainer.model).items()}
    trainer.train()
    assert trainer._structural.drawn is not None or stage == 3
    assert all(torch.equal(value, before[name]) for name, value in router_of(trainer.model).items())

    found = started_from_clusters(make(folder / "clusters"))
    torch.save(found, folder / f"clusters-{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
