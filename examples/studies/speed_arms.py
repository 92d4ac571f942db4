# SPDX-License-Identifier: Apache-2.0
"""The trainings that speed.py compares, on the same rows step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from speed_setting import SEED, Setting
from torch import nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer
from alter_peft.benchmark.teaching import LabelledTrainer
from alter_peft.data import PairSampler
from alter_peft.trainer.encoding import encoded


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )


def upper_lora(setting: Setting) -> LoraConfig:
    """On the layers that ALTER adapts by default."""
    base = setting.base
    depth = base.config.num_hidden_layers
    names = {name.rpartition(".")[2] for name, part in base.base_model.named_modules() if isinstance(part, nn.Linear)}
    return lora(target_modules=sorted(names), layers_to_transform=list(range(round(0.4 * depth), depth)))


def questions(pairs: list[tuple[str, str]], experts: int | None = None) -> Dataset:
    """As the trainers take them, which make chats of them; with a sub-domain in turn where there are several."""
    rows: list[dict[str, Any]] = [{"prompt": question, "completion": answer} for question, answer in pairs]
    if experts is not None:
        rows = [{**row, "domain": domains(experts)[place % experts]} for place, row in enumerate(rows)]
    return Dataset.from_list(rows)


def domains(experts: int) -> list[str]:
    return [f"domain_{d}" for d in range(experts)]


def _arguments(setting: Setting, steps: int) -> dict[str, Any]:
    """Of every training; what it doesn't say is at its default."""
    on_cpu = setting.device.type == "cpu"
    return {
        "output_dir": str(setting.output / "trainer"), "max_steps": steps, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "bf16": True, "use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu, "seed": SEED,
        "gradient_checkpointing": False, "max_length": None, "per_device_train_batch_size": setting.pairs,
    }  # fmt: skip


def sft(
    setting: Setting, steps: int, adapter: LoraConfig | None = None, rows: int = 40, cls: type[SFTTrainer] = SFTTrainer
) -> SFTTrainer:
    """TRL's trainer with LoRA, on the very rows of each step that the others see."""
    forget, retain, size = setting.rows.forget[:rows], setting.rows.retain[:rows], setting.pairs
    sampler = PairSampler(len(forget), len(retain), size, SEED)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < steps * size:
        sampler.set_epoch(len(pairs) // len(sampler))
        pairs += sampler
    batches = (pairs[start : start + size] for start in range(0, steps * size, size))
    ordered = [row for batch in batches for row in [*(forget[i] for i, _ in batch), *(retain[j] for _, j in batch)]]
    own = {"per_device_train_batch_size": 2 * size, "train_sampling_strategy": "sequential"}
    args = SFTConfig(**{**_arguments(setting, steps), **own})
    rows_of_ids = encoded(questions(ordered), setting.tokenizer, None)
    return cls(
        setting.fresh_model(), args, train_dataset=rows_of_ids, processing_class=setting.tokenizer,
        peft_config=adapter or lora(),
    )  # fmt: skip


def _sets(setting: Setting, rows: int, experts: int | None = None) -> dict[str, Any]:
    forget, retain = setting.rows.forget[:rows], setting.rows.retain[:rows]
    return {"train_dataset": questions(forget, experts), "retain_dataset": questions(retain)}


def npo(setting: Setting, steps: int) -> UnlearnTrainer:
    """NPO with its reference and cross-entropy on retained rows, with LoRA."""
    args = UnlearnConfig(**_arguments(setting, steps), forget_loss="npo")
    return UnlearnTrainer(
        setting.fresh_model(), args, **_sets(setting, 40), peft_config=lora(), processing_class=setting.tokenizer
    )


def alter(setting: Setting, steps: int, experts: int = 1, rows: int = 40, **options: Any) -> AlterUnlearnTrainer:
    """So many steps of ALTER at its defaults. What the router is fitted on beside the rows is no part of a step."""
    fixed = {"stopping_tolerance": None, "counterfactual_copies": 0}
    args = AlterUnlearnConfig(**{**_arguments(setting, steps), **fixed, **options})
    return AlterUnlearnTrainer(
        setting.fresh_model(), args, **_sets(setting, rows, experts), processing_class=setting.tokenizer,
        peft_config=AlterConfig(domains=domains(experts)),
    )  # fmt: skip


def whole_alter(setting: Setting, steps: int = -1, rows: int = 40, **options: Any) -> AlterUnlearnTrainer:
    """ALTER at its defaults, sub-domains, router and stopping included, with calibration rows."""
    args = AlterUnlearnConfig(**{**_arguments(setting, steps), **options})
    return AlterUnlearnTrainer(
        setting.fresh_model(), args, **_sets(setting, rows), processing_class=setting.tokenizer,
        calibration_dataset=questions(setting.rows.calibration), peft_config=AlterConfig(),
    )  # fmt: skip


Training = Callable[..., Trainer]
TRAININGS: dict[str, Training] = {
    "LoRA, TRL": sft,
    "LoRA, labelled tokens alone": lambda setting, steps: sft(setting, steps, cls=LabelledTrainer),
    "LoRA, upper layers": lambda setting, steps: sft(setting, steps, upper_lora(setting)),
    "LoRA, NPO": npo,
    "ALTER": alter,
    "ALTER, retain rows too": lambda setting, steps: alter(setting, steps, retain_weight=1.0),
}
