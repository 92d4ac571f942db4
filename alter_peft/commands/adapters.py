# SPDX-License-Identifier: Apache-2.0
"""What `--adapter` of `alter-peft unlearn` names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from inspect import get_annotations
from typing import Any, Literal, NamedTuple, get_type_hints

from peft import LoraConfig, PeftConfig

from alter_peft.options import alternatives, option, parse_values
from alter_peft.trainer import AlterUnlearnTrainer, UnlearnTrainer
from alter_peft.tuner import AlterConfig


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


# what is written into a config by itself
_OF_FILES = ("alter_peft_version", "format_version", "weights_sha256")
ADAPTERS = {
    "alter": Adapter(
        AlterUnlearnTrainer,
        AlterConfig,
        {
            one.name: None if one.default is dataclasses.MISSING else one.default
            for one in dataclasses.fields(AlterConfig)
            if one.name in get_annotations(AlterConfig) and one.name not in _OF_FILES
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


def chosen_adapter(argv: Sequence[str], config: Mapping[str, Any]) -> Adapter:
    """
    What the flags, or else the YAML file, ask for.

    Args:
        argv, config: what `read_config` gives.

    Raises:
        ValueError: an adapter that is not known, or an option of another one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--adapter")
    found, _ = first.parse_known_args(list(argv))
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    given |= {name for name, value in config.items() if value is not None}
    name = str(found.adapter or config.get("adapter") or "alter")
    if name not in ADAPTERS:
        raise ValueError(f"`--adapter` is {name!r}, but must be one of {list(ADAPTERS)}.")
    known = {
        inner: {*other.options, *(one.name for one in dataclasses.fields(other.trainer.config_class))}
        for inner, other in ADAPTERS.items()
    }
    for option_name in sorted(given):
        owners = [inner for inner, options in known.items() if option_name in options]
        if owners and name not in owners:
            kinds = " and ".join(f"`--adapter {owner}`" for owner in owners)
            raise ValueError(f"`--{option_name}` is an option of {kinds}, but `--adapter` is {name!r}. Remove it.")
    return ADAPTERS[name]
