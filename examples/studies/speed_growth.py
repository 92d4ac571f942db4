# SPDX-License-Identifier: Apache-2.0
"""How cost grows, for `speed.py --growth`: with length, rows, forget experts and vocabulary; one plot each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from speed_arms import alter, sft, whole_alter
from speed_decoding import adapted, lora, random_alter, tokens_of
from speed_setting import Rows, Setting, people
from speed_training import peak_of_steps, status
from speed_turns import (
    Found,
    Measurement,
    Samples,
    Steps,
    empty_cache,
    in_fresh_process,
    in_turn,
    timed,
    trained_in_turn,
)

from alter_peft.report.drawing import COLOURS, new_axes, save


WARM_UP, STEPS = 1, 3  # of each point; the latter are counted


class Growth(NamedTuple):
    """
    caption: of the plot, with the model that was taken.
    axis: what grows.
    values: how far.
    run: what is measured of one value, each arm's name with its unit: "LoRA (s)".
    """

    caption: str
    axis: str
    values: tuple[int, ...]
    run: Callable[[Setting, int], Found]


def of_shape(setting: Setting, model: str, **options: Any) -> Setting:
    return replace(setting, model=model, tofu=None, steps=STEPS, **options)


def with_unit(samples: Samples, unit: str) -> Samples:
    return {f"{name} ({unit})": values for name, values in samples.items()}


def by_length(setting: Setting, length: int) -> Found:
    """L_struct in every step, and in none: by default it is in one of 16."""
    own, total = of_shape(setting, "shallow", length=length, pairs=1), 1 + WARM_UP + STEPS
    arms = {
        "LoRA": sft(own, total),
        "ALTER without L_struct": alter(own, total, structural_weight=0.0),
        "ALTER, L_struct in each step": alter(own, total, structural_interval=1),
    }
    return Found(with_unit(trained_in_turn(arms, STEPS, WARM_UP), "s"), {})


def invented(count: int) -> Rows:
    """So many rows to forget, no two alike, and a tenth as many of each other kind."""
    given, vowels, consonants = people(), "aeiou", "bdfgklmnprstvz"

    def name(number: int) -> str:
        syllables = []
        for _ in range(4):
            number, at = divmod(number, len(vowels) * len(consonants))
            syllables.append(consonants[at // len(vowels)] + vowels[at % len(vowels)])
        return f"{''.join(syllables[:2])} {''.join(syllables[2:])}".title()

    def rows(begin: int, many: int) -> list[tuple[str, str]]:
        people = ((name(7919 * number), number) for number in range(begin, begin + many))
        return [
            (f"Where does {who} live?", f"{who} lives at {1 + n % 97} {name(n // 97)} Street.") for who, n in people
        ]

    few = max(50, count // 10)
    return Rows(rows(0, count), rows(count, few), given.calibration)


def whole_of_rows(setting: Setting) -> tuple[list[float], float]:
    """Seconds of making the trainer, of phase I and of a step, and the process's peak in MB."""
    with empty_cache(setting):
        trainer: Any = None

        def make() -> None:
            nonlocal trainer
            trainer = whole_alter(setting, 1 + STEPS, rows=len(setting.rows.forget), stopping_tolerance=None)

        setting.base, setting.tokenizer  # not counted # noqa: B018
        seconds = [*timed(make), *timed(trainer.prepare)]
        loop = Steps(trainer)
        steps = [taken for taken, *_ in (next(loop) for _ in range(2 + STEPS))]
        loop.close()
    return [*seconds, float(np.median(steps[2:]))], status("VmHWM") / 2**20


def by_rows(setting: Setting, count: int) -> Found:
    own = of_shape(setting, "tiny", questions=invented(count))
    seconds, peak = in_fresh_process(whole_of_rows, own)
    names = ("making the trainer", "phase I", "a step")
    samples = with_unit({name: [value] for name, value in zip(names, seconds, strict=True)}, "s")
    return Found({**samples, "peak of the process (MB)": [peak]}, {})


def by_experts(setting: Setting, experts: int) -> Found:
    own, total = of_shape(setting, "shallow"), 1 + WARM_UP + STEPS
    steps = trained_in_turn(
        {"LoRA": sft(own, total), "ALTER": alter(own, total, experts=experts, rows=128)}, STEPS, WARM_UP
    )
    models = {"LoRA": adapted(own, lora(init_lora_weights=False)), "ALTER": adapted(own, random_alter(experts))}
    tokens = in_turn({name: tokens_of(own, model, 1) for name, model in models.items()}, STEPS, 1)
    samples = {f"{name}, a step": values for name, values in steps.items()}
    return Found(with_unit({**samples, **{f"{name}, a token": values for name, values in tokens.items()}}, "s"), {})


def by_vocabulary(setting: Setting, vocabulary: int) -> Found:
    own, total = of_shape(setting, "shallow", vocabulary=vocabulary), 1 + WARM_UP + STEPS
    samples = with_unit(trained_in_turn({"LoRA": sft(own, total), "ALTER": alter(own, total)}, STEPS, WARM_UP), "s")
    for name, training in (("LoRA", "LoRA, TRL"), ("ALTER", "ALTER")):
        peak, _ = in_fresh_process(peak_of_steps, replace(own), training)
        samples[f"{name}, peak of the process (MB)"] = [peak]
    return Found(samples, {})


SHALLOW = "five layers of SmolLM2's width, random weights"
GROWTH: dict[str, Growth] = {
    "length": Growth(
        f"A training step by the length of its 1 + 1 rows ({SHALLOW}, V = 8k)",
        "tokens of a row, about", (128, 512, 2048, 8192), by_length,
    ),
    "rows": Growth(
        "What a training costs by the rows to forget (four layers of width 64, random weights)",
        "rows to forget", (100, 1000, 10_000, 100_000), by_rows,
    ),
    "experts": Growth(
        f"A training step and a token by the forget experts ({SHALLOW}, V = 8k)",
        "forget experts", (1, 2, 8, 32, 128), by_experts,
    ),
    "vocabulary": Growth(
        f"A training step by the vocabulary ({SHALLOW})",
        "tokens of the vocabulary", (32_768, 65_536, 131_072, 262_144), by_vocabulary,
    ),
}  # fmt: skip
POINTS: dict[str, Measurement] = {
    f"{name}/{value}": Measurement(
        f"{one.caption}: {value:,}", partial(lambda setting, run, at: run(setting, at), run=one.run, at=value), unit=""
    )
    for name, one in GROWTH.items()
    for value in one.values
}


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """A plot of each growth and unit that was measured of two values at least: growth_NAME.png, growth_NAME_mb.png."""
    drawn = []
    for name, one in GROWTH.items():
        points = {value: measured[f"{name}/{value}"]["arms"] for value in one.values if f"{name}/{value}" in measured}
        if len(points) < 2:
            continue
        arms = list(dict.fromkeys(arm for found in points.values() for arm in found))
        for unit, label, suffix in (("s", "seconds, median", ""), ("MB", "MB", "_mb")):
            own = [arm for arm in arms if arm.endswith(f"({unit})")]
            if not own:
                continue
            axes = new_axes()
            for place, arm in enumerate(own):
                at = [value for value, found in points.items() if arm in found]
                medians = [points[value][arm]["median"] for value in at]
                axes.plot(at, medians, marker="o", color=COLOURS[place % len(COLOURS)], label=arm.rpartition(" (")[0])
            axes.set(xscale="log", yscale="log", xlabel=one.axis, ylabel=label)
            axes.set_title(one.caption, loc="left", fontsize=9)
            drawn.append(folder / f"growth_{name}{suffix}.png")
            save(axes, drawn[-1], legend=True)
    return drawn
