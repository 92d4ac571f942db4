# SPDX-License-Identifier: Apache-2.0
"""The command line: `alter-peft unlearn` trains an adapter, `generate` asks it; the rest is of `evaluation`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.scripts.utils import TrlParser

from .chat import prompt_ids
from .commands import benchmark, evaluate, report
from .evaluation.loading import loaded
from .options import alternatives, option, parse_values
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
    adapter: Literal["alter", "lora", "none"] = option(
        "alter", "What is trained: an ALTER adapter, plain LoRA, or none: all weights."
    )
    calibration: str | None = option(
        None,
        "Rows like those to forget that the model never saw: they measure forget_level, or are the profiles of "
        "forget_loss=profile.",
    )


class Adapter(NamedTuple):
    """
    What `--adapter` names.

    trainer: the trainer, whose configuration has options of its own.
    config: the adapter's configuration; `None` if all weights are trained.
    options: those of its fields that are options, with their defaults; `None` leaves a field alone.
    """

    trainer: type[UnlearnTrainer]
    config: type[PeftConfig] | None = None
    options: Mapping[str, Any] = {}

    def arguments(self) -> type:
        """The options as a dataclass, with types that the parser knows."""
        found = []
        if self.config is not None:
            hints, known = get_type_hints(self.config), {one.name: one for one in dataclasses.fields(self.config)}
            for name, default in self.options.items():
                found.append((name, _flag_type(hints[name]), option(default, known[name].metadata["help"])))
        return dataclasses.make_dataclass("AdapterArguments", found, namespace={"_argument_group_name": "adapter"})

    def make(self, arguments: Mapping[str, Any]) -> PeftConfig | None:
        """The configuration that the flags and the YAML file describe."""
        if self.config is None:
            return None
        # `--target_modules all-linear` is a name, not a list of one
        given = {
            name: value[0] if isinstance(value, list) and len(value) == 1 else value
            for name, value in arguments.items()
            if value is not None
        }
        return self.config(**parse_values(self.config, given))


ADAPTERS = {
    "alter": Adapter(
        AlterUnlearnTrainer,
        AlterConfig,
        {
            one.name: None if one.default is dataclasses.MISSING else one.default
            for one in dataclasses.fields(AlterConfig)
            if one.name in get_annotations(AlterConfig)
        },
    ),
    "lora": Adapter(
        UnlearnTrainer,
        LoraConfig,
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["all-linear"]},
    ),
    "none": Adapter(UnlearnTrainer),
}


def _flag_type(hint: Any) -> Any:
    """The one type that a flag can parse, for a field that may be of several."""
    kinds = alternatives(hint)
    if list in kinds:
        return kinds[list] | None
    if dict in kinds:
        return str | None  # JSON
    return str if {bool, Literal} <= kinds.keys() else hint


def _adapter(argv: Sequence[str]) -> Adapter:
    """
    What the flags, or else the YAML file, ask for.

    Raises:
        ValueError: an adapter that is not known, or an option of another one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--adapter")
    first.add_argument("--config")
    found, _ = first.parse_known_args(list(argv))
    given = {flag[2:].partition("=")[0].replace("-", "_"): None for flag in argv if flag.startswith("--")}
    if found.config is not None:
        with Path(found.config).open(encoding="utf-8") as file:  # whose name an error of YAML's then has
            options = yaml.safe_load(file)
        if isinstance(options, dict):
            given |= {flag: value for flag, value in options.items() if value is not None}
    name = str(found.adapter or given.get("adapter") or "alter")
    if name not in ADAPTERS:
        raise ValueError(f"`adapter` is {name!r}, but must be one of {list(ADAPTERS)}.")
    known = {
        inner: {*other.options, *(one.name for one in dataclasses.fields(other.trainer.config_class))}
        for inner, other in ADAPTERS.items()
    }
    for flag in given:
        owners = [inner for inner, options in known.items() if flag in options]
        if owners and name not in owners:
            raise ValueError(f"`{flag}` is an option of `adapter` {' and '.join(owners)}, but that is {name!r}.")
    return ADAPTERS[name]


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
    adapter = _adapter(argv)
    groups: Any = (ScriptArguments, adapter.trainer.config_class, adapter.arguments())
    parser = TrlParser(
        groups,
        prog="alter-peft unlearn",
        allow_abbrev=False,  # `_adapter` knows whole names alone
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
        model: Any = loaded("adapter", args.adapter, AutoPeftModelForCausalLM.from_pretrained)
    else:
        base = loaded("model", args.model, AutoModelForCausalLM.from_pretrained)
        model = loaded("adapter", args.adapter, partial(PeftModel.from_pretrained, base))
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
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    with nullcontext() if with_adapter else model.disable_adapter():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
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
