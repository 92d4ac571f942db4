# SPDX-License-Identifier: Apache-2.0
"""What two processes run for tests/test_distributed.py: `accelerate launch ... distributed_run.py FOLDER`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_llama
from peft import LoraConfig, PeftModel
from torch.distributed.tensor import DTensor
from trainer_setup import adapter_state, forget_rows, make_trainer, retain_rows
from transformers import PreTrainedTokenizerFast

from alter_peft import AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer, scoring
from alter_peft.commands.adapters import ADAPTERS
from alter_peft.commands.unlearn import _run
from alter_peft.losses import score_tokens, score_tokens_and_others


CALIBRATED: dict[str, Any] = {
    "retain": retain_rows(4), "others": {"calibration_dataset": retain_rows().select(range(4, 8))},
}  # fmt: skip
# SGD is linear in the gradients. A step takes four pairs: one process a batch of 4, two processes twice 1 each
TRAJECTORY: dict[str, Any] = {
    "optim": "sgd", "learning_rate": 0.3, "shared_learning_rate": 0.3, "lr_scheduler_type": "linear",
    "num_train_epochs": 2, "retain_loss": "kl", "forget_loss": "profile", "stopping_tolerance": None, **CALIBRATED,
}  # fmt: skip
RESUMED: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
CLUSTERS: dict[str, Any] = {
    "adapter": {"init_weights": "cluster"}, "forget_loss": "level", "forget": None, **CALIBRATED,
}  # fmt: skip
# The answer probability is 1e-5 with the weights, and 3e-3 without them: what only the others would take for known
LORA_LEVELS = {"unknown": 2e-4, "known": 1e-7, "by general text": None}


def shard_on_cpu() -> None:
    """Accelerate knows FSDP on accelerators alone, though torch has it on a CPU too: say that this is FSDP."""
    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]


def spoil(trainer: UnlearnTrainer) -> None:
    """Only the main process has the weights, as with `fsdp_cpu_ram_efficient_loading`; the others must not matter."""
    if not trainer.accelerator.is_main_process:
        for parameter in trainer.model.parameters():
            parameter.data.fill_(0.5)


def train_and_save(trainer: AlterUnlearnTrainer, place: Path, **kwargs: Any) -> None:
    trainer.train(**kwargs)
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
    assert all(sharded) if trainer.is_fsdp_enabled else not any(sharded)
    trainer.save_model(place)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(place / "state.json")


def run_lora(folder: Path, tokenizer: PreTrainedTokenizerFast, forget_level: float | None) -> dict[str, Any]:
    """`alter-peft unlearn --adapter lora` once its trainer is made: its status, and what this process knows then."""
    args = UnlearnConfig(
        str(folder), bf16=False, report_to="none", save_strategy="no", as_chat=False, max_steps=1, use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2, forget_level=forget_level,
    )  # fmt: skip
    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)), args, train_dataset=forget_rows().remove_columns("domain"),
        retain_dataset=retain_rows(), processing_class=tokenizer, peft_config=LoraConfig(target_modules="all-linear"),
    )  # fmt: skip
    spoil(trainer)
    status = _run(trainer, ADAPTERS["lora"], None, False, str)
    after = trainer.summary().after.forget if trainer.state.global_step else torch.empty(0)
    return {"status": status, "before": trainer.knowledge, "targets": trainer.measured.targets, "after": after}


def main(folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
    make = functools.partial(make_trainer, tokenizer=tokenizer)
    # so small that the processes have different numbers of chunks
    scoring.score_tokens = functools.partial(score_tokens, chunk_size=5)  # type: ignore[assignment]
    scoring.score_tokens_and_others = functools.partial(  # type: ignore[assignment]
        score_tokens_and_others, chunk_size=5
    )

    trainer = make(
        folder / "run", adapter={"init_weights": False}, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        gradient_checkpointing=True, **TRAJECTORY,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    spoil(trainer)
    train_and_save(trainer, folder / "trajectory")

    def resumable(place: str) -> AlterUnlearnTrainer:
        model = PeftModel.from_pretrained(
            make_llama(len(tokenizer)), folder.parent / "adapter-of-one", is_trainable=True
        )
        return make(folder / place, model=model, per_device_train_batch_size=1, **RESUMED)

    train_and_save(resumable("whole"), folder / "whole-adapter")
    checkpoint = str(folder / "whole-checkpoints" / "checkpoint-3")
    train_and_save(resumable("rest"), folder / "rest-adapter", resume_from_checkpoint=checkpoint)

    trainer = make(folder / "clusters", **CLUSTERS)
    spoil(trainer)
    trainer.prepare()
    found = {**adapter_state(trainer), "targets": trainer.measured.targets}
    process = trainer.accelerator.process_index
    torch.save(found, folder / f"clusters-{process}.pt")

    for name, level in LORA_LEVELS.items():
        torch.save(run_lora(folder / name, tokenizer, level), folder / f"{name}-{process}.pt")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if place.name == "fsdp":
        shard_on_cpu()
    main(place)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # or its threads may abort the process as that ends
