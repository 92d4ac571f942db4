# SPDX-License-Identifier: Apache-2.0
"""The floor under speed.py's times: operations over the rate of a matrix product, bytes over that of a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from speed_arms import TRAININGS
from speed_decoding import PROMPT, TOKENS, against_lora, answered
from speed_setting import Setting
from speed_training import INTERVAL
from speed_turns import Found, Measurement, timed
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback


ROUNDS = 20
aten: Any = torch.ops.aten
# PyTorch's counter leaves these out: products in place (of TRL's head), and a CPU's own attention kernel
MISSED: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda total, a, b, *args, out_shape=None, **kwargs: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=MISSED)


class Operations(TrainerCallback):
    """The counter's total when the first step begins and after the last one."""

    def __init__(self, counting: FlopCounterMode) -> None:
        self.counting, self.totals = counting, list[int]()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.totals.append(self.counting.get_total_flops())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.totals.append(self.counting.get_total_flops())


def operations_of_a_step(setting: Setting, training: str) -> float:
    """A mean over as many steps as L_struct has an interval."""
    trainer, counting = TRAININGS[training](setting, INTERVAL), counter()
    seen = Operations(counting)
    trainer.add_callback(seen)
    with counting:
        trainer.train()
    return (seen.totals[-1] - seen.totals[0]) / INTERVAL


def operations_of_a_token(setting: Setting, model: Any) -> float:
    totals, ids = [], setting.tokens(1, PROMPT)
    for tokens in (1, 1 + TOKENS):
        with counter() as counting:
            answered(setting, model, ids, tokens)
        totals.append(counting.get_total_flops())
    return (totals[1] - totals[0]) / TOKENS


def product_rate(device: torch.device) -> float:
    """Operations a second of the best of some bfloat16 products of square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / min(timed(lambda: a @ b)[0] for _ in range(ROUNDS))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of some copies."""
    a = torch.ones(2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a))[0] for _ in range(ROUNDS))


def floor(setting: Setting) -> Found:
    weights = sum(weight.nbytes for weight in setting.base.parameters())
    if not setting.base.config.tie_word_embeddings:  # a token reads one row of them
        weights -= setting.base.get_input_embeddings().weight.nbytes
    notes = {
        "operations per second": product_rate(setting.device),
        "bytes per second": copy_rate(setting.device),
        "weights in bytes": weights,
        "operations": {
            "step": {name: operations_of_a_step(setting, name) for name in TRAININGS},
            "decoding": {name: operations_of_a_token(setting, model) for name, model in against_lora(setting).items()},
        },
    }
    return Found({}, notes)


def floors(notes: dict[str, Any], measurement: str) -> dict[str, tuple[float, float]]:
    """The seconds that each arm cannot go below: by its operations, and by reading every weight of the base once."""
    by_bytes = notes["weights in bytes"] / notes["bytes per second"]
    rate = notes["operations per second"]
    return {name: (count / rate, by_bytes) for name, count in notes["operations"].get(measurement, {}).items()}


FLOOR: dict[str, Measurement] = {"floor": Measurement("operations, and the rates of this machine", floor)}
