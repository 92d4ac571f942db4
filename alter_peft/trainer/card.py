# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState

from alter_peft.tuner.files import LOADING
from alter_peft.version import __version__
from alter_peft.words import counted

from .config import AlterUnlearnConfig
from .targets import Measured


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

{summary}## Training

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

SUMMARY = """## Before and after

Answer probability of the rows that it was trained with (exp of the mean log-probability of a row's tokens;
geometric mean over rows):

```
{lines}
```

"""
LOADING_CODE = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{place}"{options})"""
VERSIONS = ("peft", "trl", "transformers", "torch")
# Fields of the training's configuration that the card shows
OPTIONS = (
    "learning_rate", "shared_learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "forget_weight", "retain_weight", "structural_q", "structural_interval",
    "forget_loss", "forget_loss_kwargs", "stopping_tolerance", "retain_loss", "seed",
)  # fmt: skip


def trained_with(
    args: AlterUnlearnConfig, structural_weight: float, measured: Measured, state: TrainerState
) -> dict[str, Any]:
    """
    What an adapter was trained with, as its card lists it.

    Args:
        structural_weight: 0 where the term was left out.
    """
    options: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS}
    options["structural_weight"] = structural_weight
    if args.forget_loss == "level":
        options["forget_level"] = measured.described_level
    if measured.guide:
        options["token targets"] = measured.guide
    if state.epoch is not None:
        options["epochs trained"] = f"{state.epoch:g} ({counted(state.global_step, 'step')})"
    return options


def write_card(
    folder: Path,
    *,
    model_name: str,
    base: str,
    domains: Sequence[str],
    options: Mapping[str, Any],
    summary: Sequence[str] = (),
    place: Path | str,
    loading_options: Mapping[str, str | None],
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """
    Write the card of an adapter to `folder/README.md`.

    Args:
        base: name or path of the base model.
        domains: names of the sub-domains.
        options: what it was trained with.
        summary: what came of it, in lines; none of a checkpoint.
        place, loading_options: where and how it will be loaded.
    """
    data = ModelCardData(
        # a local path is no model id that the Hub could link to
        base_model=base if base and not os.path.isdir(base) else None,
        datasets=dataset_name,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=sorted(set(tags)),
    )
    code = LOADING_CODE.format(
        place=place, options="".join(f', {name}="{value}"' for name, value in loading_options.items() if value)
    )
    versions = {"alter-peft": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS}
    text = TEMPLATE.format(
        card_data=data.to_yaml(),
        model_name=model_name,
        base_model=base or "its base model",
        forgotten=f"{len(domains)} sub-domain{'s' * (len(domains) != 1)}",
        loading=LOADING.format(loading=code),
        domains="\n".join(f"{d}. {name}" for d, name in enumerate(domains, start=1)),
        summary=SUMMARY.format(lines="\n".join(summary)) if summary else "",
        options="\n".join(f"| `{name}` | {value} |" for name, value in options.items()),
        versions="\n".join(f"- {name}: {version}" for name, version in versions.items()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(text).save(folder / "README.md")
