# SPDX-License-Identifier: Apache-2.0
"""The command line: `alter-peft unlearn` trains an adapter, `generate` asks it; the rest is of `evaluation`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.scripts.utils import TrlParser

from .commands import benchmark, evaluate, report
from .options import alternatives, json_object
from .trainer import AlterUnlearnTrainer, UnlearnTrainer
from .tuner import AlterConfig


LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    adapter: Literal["alter", "lora", "none"] = field(
        default="alter", metadata={"help": "What is trained: an ALTER adapter, plain LoRA, or none: all weights."}
    )
    calibration: str | None = field(
        default=None,
        metadata={
            "help": "Rows like those to forget that the model never saw: they measure forget_level, or are the "
            "profiles of forget_loss=profile."
        },
    )


@dataclass
class LoraArguments:
    """The plain adapter of `--adapter lora`, a `peft.LoraConfig`."""

    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of its input."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the layers, or all-linear."}
    )


def _lora_config(arguments: LoraArguments) -> LoraConfig:
    targets: Any = arguments.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


@dataclass
class NoArguments:
    """`--adapter none` has none of its own."""


class Kind(NamedTuple):
    """What `--adapter` names: the trainer, its own options, and what makes the adapter's config of them."""

    trainer: type[UnlearnTrainer]
    arguments: Callable[[], type]
    config: Callable[[Any], PeftConfig | None]


def _kind(argv: Sequence[str]) -> Kind:
    """The kind of adapter that the flags, or else the YAML file, ask for."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--adapter")
    first.add_argument("--config")
    found, _ = first.parse_known_args(list(argv))
    name = found.adapter
    if name is None and found.config is not None:
        with Path(found.config).open(encoding="utf-8") as file:  # whose name an error of YAML's then has
            options = yaml.safe_load(file)
        name = options.get("adapter") if isinstance(options, dict) else None
    return ADAPTERS.get(name or "alter", ADAPTERS["alter"])  # an unknown name is the parser's to refuse


def _flag_type(hint: Any) -> Any:
    """The one type that a flag can parse, for a field that may be of several."""
    options = alternatives(hint)
    lists = [option for option in options if get_origin(option) is list]
    if lists:
        return lists[0] | None
    if any(get_origin(option) is dict for option in options):
        return str | None  # JSON
    literals = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    if literals and bool in options:
        return str  # of which `_adapter_config` makes a bool again
    return hint


def _adapter_fields() -> list[dataclasses.Field[Any]]:
    """AlterConfig's own fields, without those of every PEFT adapter."""
    inherited = {inner.name for inner in dataclasses.fields(PeftConfig)}
    return [inner for inner in dataclasses.fields(AlterConfig) if inner.name not in inherited]


def _adapter_arguments() -> type:
    """AlterConfig's own fields as a dataclass with types that the parser knows; one left alone is `None`."""
    hints = get_type_hints(AlterConfig)
    fields = []
    for inner in _adapter_fields():
        missing = inner.default is dataclasses.MISSING
        option = field(default=None if missing else inner.default, metadata=dict(inner.metadata))
        fields.append((inner.name, _flag_type(hints[inner.name]), option))
    return dataclasses.make_dataclass("AdapterArguments", fields, namespace={"_argument_group_name": "adapter"})


def _adapter_config(arguments: Any) -> AlterConfig:
    """The AlterConfig that the flags and the YAML file describe."""
    hints, values = get_type_hints(AlterConfig), {}
    for inner in _adapter_fields():
        value, options = getattr(arguments, inner.name), alternatives(hints[inner.name])
        holds = {get_origin(option) or option for option in options}
        if value is None:
            continue
        if bool in holds and str(value).lower() in ("true", "false"):
            value = str(value).lower() == "true"
        elif dict in holds and isinstance(value, str):
            value = json_object(inner.name, value)
        elif isinstance(value, list) and len(value) == 1 and not holds.isdisjoint({str, int}):
            value = value[0]  # `--target_modules all-linear` is a name, not a list of one
        elif list in holds and holds.isdisjoint({str, int}) and not isinstance(value, (list, dict)):
            value = [value]
        values[inner.name] = value
    return AlterConfig(**values)


ADAPTERS = {
    "alter": Kind(AlterUnlearnTrainer, _adapter_arguments, _adapter_config),
    "lora": Kind(UnlearnTrainer, lambda: LoraArguments, _lora_config),
    "none": Kind(UnlearnTrainer, lambda: NoArguments, lambda arguments: None),
}


def _load_rows(name: str, source: str) -> Dataset:
    loader = LOADERS.get(Path(source).suffix)
    if loader is not None and not Path(source).is_file():
        raise ValueError(f"`{name}` is {source!r}, but there is no such file.")
    try:
        if loader is None:
            return load_dataset(source, split="train")
        return load_dataset(loader, data_files=source, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        known = ", ".join(LOADERS)
        raise ValueError(
            f"`{name}` is {source!r}, which could not be read ({error.__cause__ or error}). Give a file ({known}) or "
            "the name of a Hub data set with a split 'train'."
        ) from error


def _print_subdomains(trainer: UnlearnTrainer) -> None:
    """A line for each sub-domain; the terms of a discovered one are here alone, not in what is saved."""
    if not isinstance(trainer, AlterUnlearnTrainer):
        return
    for name, subdomain in trainer.subdomains.items():
        count = len(subdomain.rows)
        terms = "" if subdomain.terms is None else f" ({subdomain.terms})"
        print(f"sub-domain {name}: {count} row{'s' * (count != 1)} to forget{terms}")


def unlearn(argv: Sequence[str]) -> Callable[[], None]:
    """What trains an adapter, saves it with the tokenizer and prints where it is; what it is given is checked here."""
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if argv and argv[-1] == "--config":
        raise ValueError("`config` has no value, but must be the path of a YAML file.")
    kind = _kind(argv)
    groups: Any = (ScriptArguments, kind.trainer.config_class, kind.arguments())
    parser = TrlParser(
        groups,
        prog="alter-peft unlearn",
        usage="alter-peft unlearn [--config options.yaml] --model M --forget F --retain R --output_dir DIR [options]",
        description="Make a model forget rows by an ALTER adapter, or by another kind (--adapter), with any forget "
        "loss (--forget_loss). Every option may also stand in a YAML file, given by --config; a flag overrides it.",
    )
    script, args, arguments = parser.parse_args_and_config(argv)
    config = kind.config(arguments)
    try:
        AutoConfig.from_pretrained(script.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` is {script.model!r}, which could not be loaded ({error}). Give a folder or a Hub id."
        ) from error
    trainer = kind.trainer(
        script.model,
        args,
        train_dataset=_load_rows("forget", script.forget),
        retain_dataset=_load_rows("retain", script.retain),
        calibration_dataset=None if script.calibration is None else _load_rows("calibration", script.calibration),
        peft_config=config,
    )

    def run() -> None:
        if trainer.is_world_process_zero():
            _print_subdomains(trainer)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
        if trainer.is_world_process_zero():
            final = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
            for name, value in final.items():
                print(f"{name}: {value:.6g}")
            if args.forget_loss == "level":
                print(f"forget_level: {trainer.measured.described_level}")
            if trainer.reached:
                print(f"reached: the forget rows have come to their level (epoch {trainer.state.epoch:g})")
            print(f"{'model' if config is None else 'adapter'}: {args.output_dir}")

    return run


def generate(argv: Sequence[str]) -> Callable[[], None]:
    """What answers prompts with an adapter, greedily, and on demand without it."""
    parser = argparse.ArgumentParser(prog="alter-peft generate", description="Ask a model that wears an adapter.")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--model", help="base model, if it isn't where the adapter was trained")
    parser.add_argument("--prompt", required=True, action="append", help="may be given more than once")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--without_adapter", action="store_true", help="print the base model's answer beside it")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {args.max_new_tokens}, but must be 1 or more.")
    if args.model is None:
        model: Any = AutoPeftModelForCausalLM.from_pretrained(args.adapter)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.adapter)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.adapter)

    def run() -> None:
        for prompt in args.prompt:
            print(f"prompt:  {prompt}")
            print(f"adapter: {_answer(model, tokenizer, prompt, args.max_new_tokens)}")
            if args.without_adapter:
                print(f"base:    {_answer(model, tokenizer, prompt, args.max_new_tokens, with_adapter=False)}")

    return run


def _answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, with_adapter: bool = True) -> str:
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    with nullcontext() if with_adapter else model.disable_adapter():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()


COMMANDS = {
    "unlearn": unlearn,
    "generate": generate,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `alter-peft`; leaves with code 2 and one line if it is given something unusable."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="alter-peft", description="Machine unlearning with ALTER adapters.")
    parser.add_argument("command", choices=COMMANDS, help="`alter-peft COMMAND --help` lists its options")
    command = parser.parse_args(argv[:1]).command
    try:
        run = COMMANDS[command](argv[1:])
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"alter-peft {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    run()  # what fails now is no matter of input: its traceback is wanted


if __name__ == "__main__":
    main()
