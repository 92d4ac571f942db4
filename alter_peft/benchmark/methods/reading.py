# SPDX-License-Identifier: Apache-2.0
"""Names of methods and their variants, and options of methods, as text or as values, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from trl import SFTConfig

from alter_peft.options import check_counts, parse_values

from ..teaching import run_arguments
from .method import Method
from .registry import METHODS


TEACH = "teach"  # options of target and oracles
VARIANT = "+"  # what stands between the name of a method and that of a variant
# What a cell rests on: checkpoints would stand in the way of what is saved, and there are no rows for an evaluation
OWN = {"output_dir", "seed", "save_strategy", "eval_strategy", "report_to", "push_to_hub"}
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # what is 1 or more


def method_named(name: str) -> Method:
    """
    The entry of `METHODS` for a method or a variant of one: `"lora_npo+tuned"` is `lora_npo` with options of its own.

    Raises:
        KeyError: a method that is not known.
    """
    return METHODS[name.partition(VARIANT)[0]]


def check_methods(field_name: str, names: Iterable[str]) -> None:
    """Raise a `ValueError` that names the field if one of these is neither a method nor a variant of one."""
    for name in names:
        method, plus, variant = name.partition(VARIANT)
        if method not in METHODS:
            raise ValueError(f"`{field_name}` has {[name]}, but must be some of {list(METHODS)}.")
        if plus and not re.fullmatch(r"[A-Za-z0-9_.=-]+", variant):
            raise ValueError(
                f"`{field_name}` has {name!r}, but a variant is named by letters, digits and any of `_.=-`, as in "
                f"'{method}{VARIANT}tuned'."
            )


def read_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """
    Options of the training of a method as the fields of its configuration take them; `"adapter"` has those of its
    adapter.

    Args:
        name: of `METHODS`, of a variant of one, or `"teach"`.

    Raises:
        ValueError: an option that is not known, is the benchmark's own, or has a value that is of no use.
    """
    method = None if name == TEACH else method_named(name)
    config = SFTConfig if method is None else method.trainer.config_class
    own = {} if method is None else method.options
    options = {**options}
    adapter = {} if method is None else options.pop("adapter", {})
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
    if method is None or not adapter:
        return found
    _check_adapter(name, method, adapter)
    return {**found, "adapter": adapter}


def _check_adapter(name: str, method: Method, adapter: Any) -> None:
    """Raise a `ValueError` if these are not fields of the method's adapter, or it refuses them."""
    if not isinstance(adapter, dict):
        raise ValueError(f"`options` for {name!r} have `adapter` {adapter!r}, but must have a field -> value.")
    if method.adapter is None:
        raise ValueError(f"`options` for {name!r} have `adapter` {adapter}, but all weights are trained. Remove it.")
    try:
        method.adapter(**adapter)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`options` for {name!r} have `adapter` {adapter}, which is refused: {error}") from error
