# SPDX-License-Identifier: Apache-2.0
"""The training rows of speed.py's table: a step, phase I, memory, forget experts, a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_arms import TRAININGS, alter, questions, sft, whole_alter
from speed_setting import SEED, SHAPES, Setting
from speed_turns import (
    WARM_UP,
    Found,
    Measurement,
    Ratio,
    Samples,
    Steps,
    empty_cache,
    in_fresh_process,
    in_turn,
    timed,
    trained_in_turn,
)

from alter_peft.benchmark.teaching import teach
from alter_peft.scoring import pad_rows


EXPERTS = (1, 32, 128)
INTERVAL = 16  # the default of `structural_interval`
SIZES = ("V = 49k", "V = 128k")  # SmolLM2's own, and that of Llama 3
ROUNDS = 5  # of phase I, which is long


def step(setting: Setting) -> Found:
    total = 1 + WARM_UP + setting.steps
    return Found(trained_in_turn({name: make(setting, total) for name, make in TRAININGS.items()}, setting.steps), {})


def steps_of_experts(setting: Setting) -> Found:
    """Every row to forget is of the next sub-domain in turn, of as many as there are rows."""
    total, rows = 1 + WARM_UP + setting.steps, max(EXPERTS)
    arms = {f"ALTER, N = {n}": alter(setting, total, experts=n, rows=rows) for n in EXPERTS}
    return Found(trained_in_turn(arms, setting.steps), {"rows to forget": len(setting.rows.forget[:rows])})


# ---- phase I --------------------------------------------------------------------------------------------------------


def forward_with_logits(setting: Setting, model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> None:
    """One pass of the base model, rows of like length together, all logits made."""
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = pad_rows([(ids, ids) for ids in ordered[start : start + batch_size]], setting.device)
        with torch.no_grad(), setting.autocast():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def phase_one(setting: Setting) -> Found:
    """
    `prepare` of a new trainer each time, of which nothing is on the disk, and forward passes of what it has looked at.

    Making the trainer, which tokenizes the rows, is not counted.
    """
    model, samples = setting.fresh_model(), Samples()
    for turn in range(1 + min(ROUNDS, setting.steps)):
        with empty_cache(setting):
            trainer: Any = whole_alter(setting)
            own = [rows["input_ids"] for rows in (trainer._forget, trainer._retain, trainer._calibration)]
            given = [list(ids) for ids in (*own[0], *own[1], *own[2])]
            beside = [text.ids for text in trainer._router_texts.beside]
            forward = partial(forward_with_logits, setting, model, batch_size=trainer.args.per_device_eval_batch_size)
            for name, seconds in (
                ("phase I", timed(trainer.prepare)),
                ("forward, rows", timed(partial(forward, rows=given))),
                ("forward, rows and the router's texts", timed(partial(forward, rows=[*given, *beside]))),
            ):
                samples.setdefault(name, []).extend(seconds if turn else [])
    tokens = {"tokens of rows": sum(map(len, given)), "tokens of the router's texts": sum(map(len, beside))}
    return Found(samples, tokens)


# ---- memory ---------------------------------------------------------------------------------------------------------


def status(entry: str) -> int:
    """Bytes that Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def peak_of_steps(setting: Setting, training: str) -> tuple[float, float]:
    """
    The most memory from the first step to one with L_struct, in MB, and what was held before the first one: of the
    process, or of what PyTorch has on the GPU for it.
    """
    on_gpu = setting.device.type == "cuda"
    others = torch.cuda.memory_allocated() if on_gpu else 0
    loop = Steps(TRAININGS[training](setting, INTERVAL + 1))
    next(loop)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = torch.cuda.memory_allocated() if on_gpu else status("VmRSS")
    for _ in range(INTERVAL):
        next(loop)
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
    loop.close()
    return (peak - others) / 2**20, (before - others) / 2**20


def memory(setting: Setting, arms: Sequence[str] = ("LoRA, TRL", "LoRA, labelled tokens alone", "ALTER")) -> Found:
    """With the model's own vocabulary, and with Llama 3's."""
    samples = Samples()
    for vocabulary in sorted({setting.base.config.vocab_size, SHAPES["llama-8b"]["vocab_size"]}):
        for arm in arms:
            in_one = partial(peak_of_steps, replace(setting, vocabulary=vocabulary), arm)
            peak, before = in_one() if setting.device.type == "cuda" else in_fresh_process(in_one)
            name = f"{arm}, V = {vocabulary // 1000}k"
            samples |= {name: [peak], f"{name}, before the first step": [before]}
    return Found(samples, {})


# ---- a whole run ----------------------------------------------------------------------------------------------------


def taught(setting: Setting) -> Setting:
    """The same with a model that knows the rows, which is kept."""
    rows = "people" if setting.tofu is None else "tofu"
    folder = setting.output / f"{Path(setting.model).name}-taught-{rows}"
    if not (folder / "config.json").exists():
        known = questions([*setting.rows.forget[:40], *setting.rows.retain[:40]])
        teach(replace(setting).base, setting.tokenizer, known, folder, SEED, num_train_epochs=6)
    return replace(setting, model=str(folder))


def landing(setting: Setting) -> Found:
    """ALTER's training as a whole, from `train` to its end, and a step of LoRA after each of its steps."""
    known = taught(setting)
    trainer: Any = whole_alter(known)
    most = int(trainer.args.num_train_epochs) * -(-len(trainer.train_dataset) // known.pairs)
    run, beside = Steps(trainer), Steps(sft(known, 1 + WARM_UP + most))
    own, lora = [], []
    with empty_cache(setting):
        in_turn({"LoRA": beside}, rounds=0, skip=1 + WARM_UP)
        for seconds in run:
            own += seconds
            lora += next(beside)
    beside.close()
    counted = lora[1:]  # the first one is beside what comes before ALTER's first step
    samples = {
        "ALTER, whole run": [sum(own) + run.rest],
        "LoRA, as many steps": [float(np.mean(counted)) * len(counted)],
    }
    notes = {"steps": len(counted), "landed": trainer.reached, "seconds before the first step": own[0]}
    return Found(samples, {**notes, "seconds of its steps": sum(own[1:]), "seconds after them": run.rest})


TRL = "TRL SFT + LoRA, all layers"
LABELLED = "LoRA, all layers, labelled tokens alone scored"
STEP = "training step, 4 + 4 rows, L_struct included"
TRAINING: dict[str, Measurement] = {
    "step": Measurement(
        "a training step",
        step,
        (
            Ratio(STEP, TRL, "ALTER", "LoRA, TRL", 0.50, "mean"),
            Ratio(STEP, "TRL SFT + LoRA, the same upper layers", "ALTER", "LoRA, upper layers", 0.63, "mean"),
            Ratio(STEP, "NPO with a reference, LoRA, this trainer", "ALTER", "LoRA, NPO", 0.50, "mean"),
            Ratio(STEP, LABELLED, "ALTER", "LoRA, labelled tokens alone", None, "mean"),
            Ratio(f"{STEP}, retained rows learned from", TRL, "ALTER, retain rows too",
                  "LoRA, TRL", None, "mean"),
        ),
    ),
    "landing": Measurement(
        "a whole run to landing, phase I included",
        landing,
        (Ratio("whole run to landing, phase I included", "as many LoRA steps", "ALTER, whole run",
               "LoRA, as many steps", 0.60),),
        of_shapes=False,
    ),
    "phase_one": Measurement(
        "phase I",
        phase_one,
        (
            Ratio("phase I", "one forward of the same rows with logits", "phase I", "forward, rows", 1.3),
            Ratio("phase I", "the same and the router's texts", "phase I", "forward, rows and the router's texts"),
        ),
        of_shapes=False,
    ),
    "memory": Measurement(
        "peak memory of training steps",
        memory,
        tuple(
            Ratio(f"peak memory of a step, {size}", against, f"ALTER, {size}", f"{other}, {size}", target)
            for size in SIZES
            for against, other, target in (
                (TRL, "LoRA, TRL", 0.80),
                (LABELLED, "LoRA, labelled tokens alone", None),
            )
        ),
        unit="MB",
    ),
    "experts_step": Measurement(
        "a training step with N forget experts",
        steps_of_experts,
        tuple(
            Ratio(f"training step, N = {n}", "N = 1", f"ALTER, N = {n}", "ALTER, N = 1", 1.05, "mean")
            for n in EXPERTS[1:]
        ),
    ),
}  # fmt: skip
