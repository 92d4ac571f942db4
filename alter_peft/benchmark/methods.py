# SPDX-License-Identifier: Apache-2.0
"""What a benchmark compares: the methods that make a model forget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from alter_peft.options import check_counts, parse_values
from alter_peft.trainer import AlterUnlearnTrainer, UnlearnTrainer
from alter_peft.tuner import AlterConfig

from .teaching import run_arguments


class UnlearningData(NamedTuple):
    """
    What a method is given.

    forget, retain: rows as [`AlterUnlearnTrainer`] takes them.
    calibration: text like the forget rows that was never trained on, for the methods that can use it.
    as_chat: whether rows are turns of a chat, as in [`UnlearnConfig`].
    """

    forget: Dataset
    retain: Dataset
    calibration: Dataset | None = None
    as_chat: bool | None = None


# What a cell rests on: checkpoints would stand in the way of what is saved, and there are no rows for an evaluation
OWN = {"output_dir", "seed", "save_strategy", "eval_strategy", "report_to", "push_to_hub"}
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # what is 1 or more


def read_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    Options of the training of a method as the fields of its configuration take them.

    Args:
        name: of `METHODS`, or `"teach"`.

    Raises:
        ValueError: an option that is not known, is the benchmark's own, or has a value that is of no use.
    """
    config = SFTConfig if name == "teach" else METHODS[name].trainer.config_class
    own = {} if name == "teach" else METHODS[name].options
    taken = sorted(OWN & options.keys())
    if taken:
        raise ValueError(f"`options` has {taken} for {name!r}, which the benchmark sets itself. Remove them.")
    unknown = sorted(set(options) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"`options` has {unknown} for {name!r}, but those must be fields of {config.__name__}.")
    try:
        found = parse_values(config, options)
        args = config(output_dir="", **{**run_arguments(), **own, **found})
        check_counts(**{name: getattr(args, name) for name in COUNTS})
        if not args.learning_rate >= 0:
            raise ValueError(f"`learning_rate` is {args.learning_rate}, but must be 0 or more.")
        if not args.num_train_epochs > 0:
            raise ValueError(f"`num_train_epochs` is {args.num_train_epochs}, but must be above 0.")
        if args.max_steps < 1 and args.max_steps != -1:
            raise ValueError(f"`max_steps` is {args.max_steps}, but must be 1 or more, or -1 for whole epochs.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`options` for {name!r} are {options}, which {config.__name__} refuses: {error}") from error
    return found


@dataclass(frozen=True)
class Method:
    """
    An entry of `METHODS`: a trainer, the adapter that it trains, and how.

    Attributes:
        caption: what it is, for tables and docs.
        trainer: the class; its configuration is `trainer.config_class`.
        adapter: makes the config of the adapter.
        options: of the training, over the configuration's defaults.
        stacks: whether a later request gets an adapter of its own beside the earlier ones, which stay active; else it
            trains the adapter on.
        calibrates: whether it is given text like the forget rows that was never trained on.
    """

    caption: str
    trainer: type[UnlearnTrainer]
    adapter: Callable[[], PeftConfig]
    options: dict[str, Any] = field(default_factory=dict)
    stacks: bool = False
    calibrates: bool = False

    def run(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: UnlearningData,
        folder: Path,
        seed: int,
        options: dict[str, Any],
    ) -> PeftModel:
        """
        The model with an adapter, which is saved in `folder`.

        Args:
            model: the target, or what an earlier request left.
            options: of the training, over the method's own.
        """
        earlier = list(model.peft_config) if isinstance(model, PeftModel) else []
        if isinstance(model, PeftModel) and self.stacks:
            name = f"request_{len(earlier)}"
            model.add_adapter(name, self.adapter())
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
            peft_config=None if earlier else self.adapter(),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
        if self.stacks:
            trainer.model.base_model.set_adapter(list(trainer.model.peft_config), inference_mode=True)
        found: PeftModel = trainer.model
        return found


def _lora() -> PeftConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


# TOFU unlearns for 5 epochs; the learning rate is the pilot's, nothing else is tuned
LORA: dict[str, Any] = {
    "num_train_epochs": 5, "per_device_train_batch_size": 4, "learning_rate": 5e-4, "gradient_checkpointing": False,
    "lr_scheduler_type": "linear",
}  # fmt: skip
# ALTER's epochs and schedule, under which a loss that has targets stops at them; the rate is LORA's
TO_TARGETS: dict[str, Any] = {**LORA, "num_train_epochs": 30, "lr_scheduler_type": "constant"}

METHODS: dict[str, Method] = {
    "alter": Method(
        "this package's defaults: context router, `forget_loss=\"level\"`",
        AlterUnlearnTrainer, AlterConfig, stacks=True, calibrates=True,
    ),
    "alter_profile": Method(
        "`alter` with `forget_loss=\"profile\"`: every token of a forget row comes to the rank of an unseen row's, "
        "not the row's mean alone",
        AlterUnlearnTrainer, AlterConfig, {"forget_loss": "profile"}, stacks=True, calibrates=True,
    ),
    "alter_paper": Method(
        "`alter` with the paper's loss as printed (`forget_loss=\"ihl\"`), three epochs, no level: what it comes to "
        "by itself",
        AlterUnlearnTrainer, AlterConfig, {"forget_loss": "ihl", "num_train_epochs": 3},
        stacks=True, calibrates=True,
    ),
    "alter_npo": Method(
        "ALTER's router and isolation with NPO as the forget loss, for `lora_npo`'s epochs and schedule: what the "
        "loss and its calibration are worth",
        AlterUnlearnTrainer, AlterConfig,
        {"forget_loss": "npo", "num_train_epochs": 5, "lr_scheduler_type": "linear"}, stacks=True,
    ),
    "asymlora": Method(
        "`alter` with `router=\"static\"`: all text sees all experts (AsymLoRA, Eqs. 2 and 6)",
        AlterUnlearnTrainer, lambda: AlterConfig(router="static"), stacks=True, calibrates=True,
    ),
    "lora_level": Method(
        "plain LoRA with ALTER's default loss, level and stopping, at the rate of the others: what the adapter "
        "and its router are worth",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "level"}, calibrates=True,
    ),
    "lora_profile": Method(
        "`lora_level` with `forget_loss=\"profile\"`",
        UnlearnTrainer, _lora, {**TO_TARGETS, "forget_loss": "profile"}, calibrates=True,
    ),
    "lora_ihl": Method(
        "plain LoRA, inverted hinge loss on the forget rows plus cross-entropy on retain rows: LoKU's loss "
        "(2408.06621), without its FILA start",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "ihl"},
    ),
    "lora_ga": Method(
        "plain LoRA, gradient ascent plus cross-entropy on retain rows (GradDiff, 2401.06121)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "ga"},
    ),
    "lora_npo": Method(
        "plain LoRA, negative preference optimisation (NPO) plus cross-entropy on retain rows (2404.05868, beta 0.1)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "npo"},
    ),
    "lora_simnpo": Method(
        "plain LoRA, the form of NPO without a reference plus cross-entropy on retain rows (SimNPO, 2410.07163, "
        "beta 4.5, weight 0.125 and no margin, as in open-unlearning)",
        UnlearnTrainer, _lora, {**LORA, "forget_loss": "simnpo"},
    ),
}  # fmt: skip
