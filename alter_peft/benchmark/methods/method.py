# SPDX-License-Identifier: Apache-2.0
"""What a method is: a trainer, the adapter that it trains, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alter_peft.evaluation.loading import load
from alter_peft.trainer import UnlearnTrainer

from ..teaching import run_arguments


class UnlearningData(NamedTuple):
    """
    What a method is given.

    forget, retain: rows as [`AlterUnlearnTrainer`] takes them.
    calibration: text like the forget rows that was never trained on, for the methods that can use it.
    as_chat: whether rows are turns of a chat, as in [`UnlearnConfig`].
    reference: folder or Hub id of the model before it was taught the rows, for the methods that can use it.
    """

    forget: Dataset
    retain: Dataset
    calibration: Dataset | None = None
    as_chat: bool | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Method:
    """
    An entry of `METHODS`: a trainer, the adapter that it trains, and how.

    Attributes:
        caption: what it is, for tables and docs.
        trainer: the class; its configuration is `trainer.config_class`.
        adapter: makes the config of the adapter, and takes fields of it that are to differ; `None` if all weights are
            trained.
        options: of the training, over the configuration's defaults.
        stacks: whether a later request gets an adapter of its own beside the earlier ones, which stay active; else it
            trains the adapter on.
        calibrates: whether it is given text like the forget rows that was never trained on.
        refers: whether it is given the model as it was before it was taught the rows.
    """

    caption: str
    trainer: type[UnlearnTrainer]
    adapter: Callable[..., PeftConfig] | None
    options: dict[str, Any] = field(default_factory=dict)
    stacks: bool = False
    calibrates: bool = False
    refers: bool = False

    def run(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: UnlearningData,
        folder: Path,
        seed: int,
        options: dict[str, Any],
    ) -> PreTrainedModel | PeftModel:
        """
        The model that has forgotten; its adapter, or all of it, is saved in `folder`.

        Args:
            model: the target, or what an earlier request left.
            options: of the training, over the method's own; `"adapter"` has fields of the adapter's config.
        """
        options = {**options}
        adapter = options.pop("adapter", {})
        earlier = list(model.peft_config) if isinstance(model, PeftModel) else []
        if isinstance(model, PeftModel) and self.stacks and self.adapter is not None:
            name = f"request_{len(earlier)}"
            model.add_adapter(name, self.adapter(**adapter))
            tuner: Any = model.base_model
            tuner.set_adapter([name, *earlier])  # trained as it will be asked, beside the earlier ones
        elif isinstance(model, PeftModel):
            model.set_adapter(model.active_adapter)  # frozen if it was loaded
        args = {**run_arguments(), "as_chat": data.as_chat, **self.options, **options}
        trainer = self.trainer(
            model,
            self.trainer.config_class(output_dir=str(folder), seed=seed, **args),
            train_dataset=data.forget,
            retain_dataset=data.retain,
            calibration_dataset=data.calibration if self.calibrates else None,
            reference_model=data.reference if self.refers else None,
            peft_config=None if earlier or self.adapter is None else self.adapter(**adapter),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
        if self.stacks:
            trainer.model.base_model.set_adapter(list(trainer.model.peft_config), inference_mode=True)
        found: PreTrainedModel | PeftModel = trainer.model
        return found


def trained(target: Path, folder: Path) -> PreTrainedModel | PeftModel:
    """What a method has saved in a folder, on the target that it began with, as it is asked."""
    if not (folder / "adapter_config.json").is_file():
        return load(folder)
    return PeftModel.from_pretrained(load(target), folder).eval()
