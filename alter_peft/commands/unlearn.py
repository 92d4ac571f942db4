# SPDX-License-Identifier: Apache-2.0
"""`alter-peft unlearn`: trains an adapter and saves it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoConfig
from trl.scripts.utils import TrlParser

from alter_peft.cli import MEASURED_AND_FAILED
from alter_peft.evaluation.loading import loaded
from alter_peft.options import option
from alter_peft.trainer import AlterUnlearnTrainer, UnlearnTrainer

from .adapters import chosen_adapter
from .rows import load_rows


@dataclass
class ScriptArguments:
    """What `alter-peft unlearn` works on."""

    model: str = field(metadata={"help": "Folder or Hub id of the model that shall forget."})
    forget: str = field(
        metadata={"help": "Rows to forget: a .jsonl, .json, .csv or .parquet file, or a Hub data set."}
    )
    retain: str = field(
        metadata={"help": "Rows to retain: a .jsonl, .json, .csv or .parquet file, or a Hub data set."}
    )
    adapter: Literal["alter", "lora", "none"] = option(
        "alter", "What is trained: an ALTER adapter, plain LoRA, or none: all weights."
    )
    calibration: str | None = option(
        None,
        "Rows like those to forget that the model never saw: they measure forget_level, or are the profiles of "
        "forget_loss=profile.",
    )
    force: bool = option(False, "Train even if the model does not know the rows to forget.")


def _print_subdomains(trainer: UnlearnTrainer) -> None:
    """A line for each sub-domain; the terms of a discovered one are here alone, not in what is saved."""
    if not isinstance(trainer, AlterUnlearnTrainer):
        return
    for name, subdomain in trainer.subdomains.items():
        count = len(subdomain.rows)
        terms = "" if subdomain.terms is None else f" ({subdomain.terms})"
        print(f"sub-domain {name}: {count} row{'s' * (count != 1)} to forget{terms}")


def unlearn(argv: Sequence[str]) -> Callable[[], int | None]:
    """What trains an adapter, saves it with the tokenizer and prints where it is; what it is given is checked here."""
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if argv and argv[-1] == "--config":
        raise ValueError("`config` has no value, but must be the path of a YAML file.")
    adapter = chosen_adapter(argv)
    groups: Any = (ScriptArguments, adapter.trainer.config_class, adapter.arguments())
    parser = TrlParser(
        groups,
        prog="alter-peft unlearn",
        allow_abbrev=False,  # `chosen_adapter` knows whole names alone
        usage="alter-peft unlearn [--config options.yaml] --model M --forget F --retain R --output_dir DIR [options]",
        description="Make a model forget rows by an ALTER adapter, or by another kind (--adapter), with any forget "
        "loss (--forget_loss). Every option may also stand in a YAML file, given by --config; a flag overrides it.",
    )
    script, args, arguments = parser.parse_args_and_config(argv)
    config = adapter.make(vars(arguments))
    loaded("model", script.model, AutoConfig.from_pretrained)
    trainer = adapter.trainer(
        script.model,
        args,
        train_dataset=load_rows("forget", script.forget),
        retain_dataset=load_rows("retain", script.retain),
        calibration_dataset=None if script.calibration is None else load_rows("calibration", script.calibration),
        peft_config=config,
    )

    def run() -> int | None:
        main = trainer.is_world_process_zero()
        if main:
            _print_subdomains(trainer)
        trainer.prepare()
        unknown = trainer.knowledge.warning
        if main:
            print("answer probability before the training:", *trainer.knowledge.lines, sep="\n")
        if unknown and not script.force:
            if main:
                print(f"alter-peft unlearn: {unknown} `--force` trains all the same.", file=sys.stderr)
            return MEASURED_AND_FAILED
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
        summary = trainer.summary()
        if main:
            print("answer probability before -> after:", *summary.lines, sep="\n")
            print(f"{'model' if config is None else 'adapter'}: {args.output_dir}")
        return None if summary.is_forgotten else MEASURED_AND_FAILED

    return run
