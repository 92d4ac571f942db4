# SPDX-License-Identifier: Apache-2.0
"""Options of methods, as text or as values, checked."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from trl import SFTConfig

from alter_peft.options import check_counts, parse_values

from ..teaching import run_arguments
from .registry import METHODS


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
