# SPDX-License-Identifier: Apache-2.0
"""Which values a field of [`AlterConfig`] may have, whatever the other fields have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .values import is_count, is_finite_number, is_index, is_positive, require


class Range(NamedTuple):
    """
    holds: whether a value is in it.
    fix: what a value must be, as the error says it.
    """

    holds: Callable[[Any], bool]
    fix: str


def is_pattern(value: Any) -> bool:
    """Whether something is said of layers by their names."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def are_indices(value: Any) -> bool:
    """Whether it is the index of a layer, or several."""
    listed = list(value) if isinstance(value, (list, tuple, range)) else [value]
    return bool(listed) and all(map(is_index, listed))


PATTERN = Range(is_pattern, "a dict, name or regular expression of layers -> number")
SWITCH = Range(lambda value: isinstance(value, bool), "True or False")
RANGES: dict[str, Range] = {
    "r": Range(is_count, "a positive integer"),
    "lora_alpha": Range(is_positive, "a positive number"),
    "lora_dropout": Range(lambda p: is_finite_number(p) and 0 <= p < 1, "at least 0 and below 1"),
    "rank_pattern": PATTERN,
    "alpha_pattern": PATTERN,
    "bias": Range(lambda bias: bias in ("none", "all", "alter_only"), "'none', 'all' or 'alter_only'"),
    "entropy_q": Range(is_positive, "above 0 and finite (1 is Shannon's entropy)"),
    "entropy_threshold": Range(lambda s: s is None or (is_finite_number(s) and s >= 0), "at least 0"),
    "entropy_quantile": Range(
        lambda share: share is None or (is_finite_number(share) and 0 < share < 1), "between 0 and 1, exclusive"
    ),
    "temperature_high": Range(is_positive, "above 0 and finite"),
    "temperature_low": Range(is_positive, "above 0 and finite"),
    "top_k": Range(is_count, "a positive integer"),
    "router_half_life": Range(is_positive, "above 0 and finite, in tokens"),
    "router_hidden_size": Range(is_index, "0 or a positive integer"),
    "init_weights": Range(lambda value: isinstance(value, bool) or value == "cluster", "True, False or 'cluster'"),
    "use_rslora": SWITCH,
    "fan_in_fan_out": SWITCH,
    "ensure_weight_tying": SWITCH,
    "num_forget_experts": Range(lambda n: n is None or is_count(n), "a positive integer"),
    "layers_to_transform": Range(
        lambda layers: layers is None or are_indices(layers),
        "the index of a layer, 0 or positive, or a list of indices",
    ),
    "router_layer": Range(lambda layer: layer is None or is_index(layer), "0 or a positive integer"),
}
# of each value in a dict
OF_LAYERS: dict[str, Range] = {"rank_pattern": RANGES["r"], "alpha_pattern": RANGES["lora_alpha"]}


def check_ranges(values: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` that names the field, the value and the fix if one is out of its range.

    Args:
        values: of all fields, by their names.
    """
    for name, (holds, fix) in RANGES.items():
        require(holds(values[name]), name, values[name], fix)
    for name, (holds, fix) in OF_LAYERS.items():
        for layers, value in values[name].items():
            require(holds(value), f"{name}[{layers!r}]", value, fix)
