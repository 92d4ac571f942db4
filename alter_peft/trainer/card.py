# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from alter_peft import __version__
from alter_peft.tuner.files import LOADING


if TYPE_CHECKING:
    from .trainer import AlterUnlearnTrainer


TEMPLATE = """---
{card_data}
---

# {model_name}

An [ALTER](https://huggingface.co/papers/2603.01792) adapter that makes `{base_model}` forget {forgotten}.

## Use

{loading}
The base model still holds what was forgotten: whoever removes or disables the adapter has it back.

## Sub-domains

{domains}

## Training

| option | value |
|---|---|
{options}

### Framework versions

{versions}

## Citation

```bibtex
@misc{{alter2026,
  title  = {{ALTER}},
  eprint = {{2603.01792}},
  archivePrefix = {{arXiv}}
}}
```
"""

LOADING_CODE = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{place}"{options})"""
VERSIONS = ("peft", "trl", "transformers", "torch")
OPTIONS = (
    "learning_rate", "shared_learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "forget_weight", "retain_weight", "structural_weight", "structural_q",
    "structural_interval", "forget_loss", "landing_tolerance", "margin", "retain_loss", "seed",
)  # fmt: skip


def write_card(
    trainer: AlterUnlearnTrainer,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    place: Path | None = None,
) -> None:
    """Write the card of the trainer's adapter to `folder/README.md`; `place` is where it will be loaded from."""
    config = trainer.alter_config
    base = trainer.model.get_base_model().config._name_or_path
    extra = [tags] if isinstance(tags, str) else list(tags or [])
    data = ModelCardData(
        # a local path is no model id that the Hub could link to
        base_model=base if base and not os.path.isdir(base) else None,
        datasets=dataset_name,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=sorted({*trainer._tag_names, *extra}),
    )
    domains = config.domains or []
    options: dict[str, str | None] = {}
    if trainer.hub_model_id:
        name = trainer.adapter_name
        options = {"revision": trainer.args.hub_revision, "subfolder": None if name == "default" else name}
    code = LOADING_CODE.format(
        place=trainer.hub_model_id or place or folder,
        options="".join(f', {name}="{value}"' for name, value in options.items() if value),
    )
    versions = {"alter-peft": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS}
    text = TEMPLATE.format(
        card_data=data.to_yaml(),
        model_name=model_name or Path(trainer.hub_model_id or str(trainer.args.output_dir)).name,
        base_model=base or "its base model",
        forgotten=f"{len(domains)} sub-domain{'s' * (len(domains) != 1)}",
        loading=LOADING.format(loading=code),
        domains="\n".join(f"{d}. {name}" for d, name in enumerate(domains, start=1)),
        options="\n".join(f"| `{name}` | {value} |" for name, value in _options(trainer).items()),
        versions="\n".join(f"- {name}: {version}" for name, version in versions.items()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(text).save(folder / "README.md")


def _options(trainer: AlterUnlearnTrainer) -> dict[str, Any]:
    """What the adapter was trained with, and what came of it."""
    options: dict[str, Any] = {name: getattr(trainer.args, name) for name in OPTIONS}
    options["structural_weight"] = trainer.structural_weight
    if trainer.args.forget_loss == "level":
        options["forget_level"] = described_level(trainer)
    if trainer.state.epoch is not None:
        options["epochs trained"] = f"{trainer.state.epoch:g} ({trainer.state.global_step} steps)"
    return options


def described_level(trainer: AlterUnlearnTrainer) -> str:
    """The level that the forget rows come to, and whether it was measured."""
    source = "measured on `calibration_dataset`" if trainer.has_measured_level else "a guess"
    return f"{trainer.forget_level:.4g} ({source})"
