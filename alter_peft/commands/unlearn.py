# SPDX-License-Identifier: Apache-2.0
"""`alter-peft unlearn`: trains an adapter and saves it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from transformers import AutoConfig
from trl import SFTConfig

from alter_peft.cli import MEASURED_AND_FAILED
from alter_peft.evaluation.loading import load_model, load_tokenizer, loaded, merge_of
from alter_peft.options import option
from alter_peft.reading import COLUMNS_HELP, OFFERED, parse_columns, read_all
from alter_peft.reading.columns import ALTERNATE, SUBJECT
from alter_peft.trainer import AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer
from alter_peft.trainer.checkpoints import checkpoint_to_resume
from alter_peft.trainer.pushing import NotPushedError
from alter_peft.words import counted

from .adapters import Adapter, chosen_adapter
from .parser import OptionParser, Section, read_config
from .retain import AUTO, CORPUS, RETAIN, check_retain, found_rows


# of TRL and transformers
TRAINING = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_length", "bf16",
    "use_cpu", "seed", "logging_steps", "report_to", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "model_init_kwargs", "push_to_hub", "hub_model_id",
)  # fmt: skip
# `alter-peft evaluate` has the arithmetic mean, as TOFU
PROBABILITY = "answer probability (geometric mean over rows)"
# the trainer's arguments -> the options that they come from
ROWS = {
    "train_dataset": "forget",
    "retain_dataset": "retain",
    "calibration_dataset": "calibration",
    "peft_config": "adapter",
}


@dataclass
class ScriptArguments:
    """What `alter-peft unlearn` works on."""

    model: str = field(
        metadata={
            "help": "Folder or Hub id of the model that shall forget; a LoRA adapter is merged into its base first."
        }
    )
    forget: str = field(
        metadata={"help": f"Rows to forget: a {OFFERED}, a folder of .txt, or a Hub data set (name:config:split)."}
    )
    retain: str | None = option(None, RETAIN)
    corpus: str | None = option(None, CORPUS)
    columns: list[str] = option([], COLUMNS_HELP)
    adapter: Literal["alter", "lora", "none"] = option(
        "alter", "What is trained: an ALTER adapter, plain LoRA, or none: all weights."
    )
    calibration: str | None = option(
        None,
        "Rows like those to forget that the model never saw: they measure where forgetting stops, or are the profiles "
        "of forget_loss=profile.",
    )
    reference_model: str | None = option(
        None,
        "Folder or Hub id of a model of the same tokenizer that does not know the rows to forget, such as the one "
        "before its fine-tuning: it says which tokens give way.",
    )
    force: bool = option(False, "Train even if the model does not know the rows to forget.")


def _print_subdomains(trainer: UnlearnTrainer) -> None:
    """
    A line for each sub-domain, and one of whom the rows are about.

    It, and the terms of a discovered sub-domain, are here alone, not in what is saved.
    """
    if not isinstance(trainer, AlterUnlearnTrainer):
        return
    for name, subdomain in trainer.subdomains.items():
        terms = "" if subdomain.terms is None else f" ({subdomain.terms})"
        print(f"sub-domain {name}: {counted(len(subdomain.rows), 'row')} to forget{terms}")
    print(*trainer.subject_lines, sep="\n", end="\n" * bool(trainer.subject_lines))


def _sections(adapter: Adapter) -> list[Section]:
    """Our own options, and those of TRL and transformers that are asked for most."""
    inherited = {one.name for one in fields(SFTConfig)}
    of_all, of_adapter = get_annotations(UnlearnConfig), get_annotations(adapter.trainer.config_class)
    return [
        Section("what is forgotten", "", [*(one.name for one in fields(ScriptArguments)), "output_dir"]),
        Section("how it is forgotten", "", [name for name in of_all if name not in inherited]),
        Section(
            "training",
            "Those of TRL and transformers that are asked for most; --help-all shows the others.",
            [*TRAINING, *(name for name in {**of_all, **of_adapter} if name in inherited and name not in TRAINING)],
        ),
        Section("training of this adapter", "", [name for name in of_adapter if name not in {*inherited, *of_all}]),
        Section("the adapter", "", list(adapter.options)),
    ]


def unlearn(argv: Sequence[str]) -> Callable[[], int | None]:
    """What trains an adapter, saves it with the tokenizer and prints where it is; what it is given is checked here."""
    argv, config = read_config(argv)
    adapter = chosen_adapter(argv, config)
    parser = OptionParser(
        (ScriptArguments, adapter.trainer.config_class, adapter.arguments()),
        sections=_sections(adapter),
        hidden=[one.name for one in fields(SFTConfig)],
        required=["output_dir"],
        once=["forget", "retain", "calibration", "corpus"],
        prog="alter-peft unlearn",
        usage="alter-peft unlearn [--config options.yaml] --model M --forget F --retain R --output_dir DIR [options]",
        description="Make a model forget rows by an ALTER adapter, or by another kind (--adapter), with any forget "
        "loss (--forget_loss).",
    )
    script, args, arguments = parser.parse(argv, config)
    with parser.in_flags(ROWS):
        checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, Path(str(args.checkpoint_dir)))
        trainer = _trainer(script, args, adapter, adapter.make(vars(arguments)), checkpoint)

    def run() -> int | None:
        with parser.in_flags(ROWS) as said:
            return _run(trainer, adapter, checkpoint, script.force, said)

    return run


def _check_sources(script: ScriptArguments, output_dir: str) -> None:
    """Raise a `ValueError` if what is read is no text (of a YAML file), or would be written over."""
    for name in ("model", "forget", "retain", "calibration", "corpus", "reference_model"):
        value = getattr(script, name)
        if not isinstance(value, str | None):
            raise ValueError(f"`{name}` is {value!r}, but must be one text.")
        if value and Path(value).exists() and Path(value).resolve() == Path(output_dir).resolve():
            raise ValueError(f"`output_dir` is {output_dir!r}, which `{name}` is read from. Give another folder.")


def _trainer(
    script: ScriptArguments, args: UnlearnConfig, adapter: Adapter, config: PeftConfig | None, checkpoint: str | None
) -> Any:
    _check_sources(script, str(args.output_dir))
    check_retain(script.retain, script.corpus)
    model, tokenizer = _model(script, args)
    retain = None if script.retain == AUTO else script.retain
    given = {
        "--forget": script.forget, "--retain": retain, "--calibration": script.calibration, "--corpus": script.corpus
    }  # fmt: skip
    rows = read_all(
        {flag: source for flag, source in given.items() if source is not None},
        parse_columns(script.columns),
        extras={"--forget": ("domain", SUBJECT, ALTERNATE)},
        text_field=args.dataset_text_field,
        whole_chats=args.completion_only_loss is False,
    )
    sets, taken = {flag: one.dataset for flag, one in rows.items()}, [one.taken for one in rows.values()]
    if retain is None:
        sets["--retain"], said = found_rows(sets["--forget"], sets.get("--corpus"))
        taken.append(said)
    if args.process_index == 0:
        print(*taken, sep="\n")
    trainer = adapter.trainer(
        model,
        args,
        train_dataset=sets["--forget"],
        retain_dataset=sets["--retain"],
        calibration_dataset=sets.get("--calibration"),
        reference_model=script.reference_model,
        peft_config=config,
        processing_class=tokenizer,
    )
    trainer.check_goes_on(checkpoint)
    return trainer


def _model(script: ScriptArguments, args: UnlearnConfig) -> tuple[Any, Any]:
    """The model and its tokenizer: a name, and TRL loads both as it likes, unless the model is itself an adapter."""
    merge = merge_of("model", script.model)
    if merge is None:
        loaded("model", script.model, AutoConfig.from_pretrained)
        return script.model, None
    if script.adapter == "lora":  # AutoPeftModel would load it without the first one, and not say so
        raise ValueError(
            f"`model` is {script.model!r}, an adapter, on which PEFT cannot load a second one of plain LoRA. Merge it "
            f"into its base model, {merge.base!r}, by `merge_and_unload()`, and give the folder of what is saved."
        )
    if args.process_index == 0:
        print(f"`--model` {merge}")
    given: Any = args.model_init_kwargs or {}
    options, args.model_init_kwargs = {"dtype": torch.float32, **given}, None  # the type is TRL's default
    model = loaded("model", script.model, partial(load_model, **options))
    return model, loaded("model", script.model, load_tokenizer)


def _run(
    trainer: Any, adapter: Adapter, checkpoint: str | None, force: bool, said: Callable[[str], str]
) -> int | None:
    args, main = trainer.args, trainer.is_world_process_zero()
    if main:
        _print_subdomains(trainer)
    trainer.prepare()
    unknown = trainer.knowledge.warning
    if main:
        print(f"{PROBABILITY} before the training:", *trainer.knowledge.lines, sep="\n")
    if unknown and not force:
        if main:
            print(f"alter-peft unlearn: {said(unknown)} `--force` trains all the same.", file=sys.stderr)
        return MEASURED_AND_FAILED
    trainer.train(resume_from_checkpoint=checkpoint)
    not_pushed: NotPushedError | None = None
    try:
        trainer.save_model(args.output_dir)
    except NotPushedError as error:  # saved: what came of it is to be read first
        not_pushed = error
    summary = trainer.summary()
    if main:
        print(f"{PROBABILITY} before -> after:", *map(said, summary.lines), sep="\n")
        print(f"{'model' if adapter.config is None else 'adapter'}: {args.output_dir}")
    if not_pushed is not None:
        raise not_pushed
    return None if unknown or summary.is_forgotten else MEASURED_AND_FAILED
