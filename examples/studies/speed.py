# SPDX-License-Identifier: Apache-2.0
"""
What ALTER costs beside plain LoRA: training, phase I, memory, decoding, loading; as ratios, each measured in turn.

    python examples/studies/speed.py runs/speed --model runs/smollm2 --tofu ../shared/data/tofu
    python examples/studies/speed.py runs/speed --only step landing     # some of it; what was measured is kept
    python examples/studies/speed.py runs/speed --growth                # how cost grows, with a plot each
    python examples/studies/speed.py runs/speed --shapes llama-1b llama-8b   # random weights, for a GPU

On a CPU the weights are float32 under bfloat16 autocast, on a GPU bfloat16. Each measurement goes into
OUTPUT/speed.json once it is there, and a run leaves out what it finds (`--again`: measures it anew). In the end the
tables of all that was measured are printed. `make speed` sets what a CPU wants. docs/performance.md says what is
measured how.
"""

from __future__ import annotations

import os


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for their turn must not spin
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import datetime
import gc
import json
import platform
import time
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from speed_decoding import DECODING
from speed_floor import FLOOR, floors
from speed_growth import POINTS, draw
from speed_setting import SHAPES, Setting
from speed_training import TRAINING
from speed_turns import Measurement, compared, summarized

from alter_peft.evaluation.tables import Table, to_markdown


MEASUREMENTS: dict[str, Measurement] = {**TRAINING, **DECODING, **FLOOR}
LENGTH = 512  # tokens of a row of --shapes, where it keeps a GPU busy
Measured = dict[str, Any]


def chosen(known: dict[str, Measurement], patterns: list[str] | None) -> dict[str, Measurement]:
    """
    Those that a name or pattern of `--only` names; all without.

    Raises:
        ValueError: one of them names nothing.
    """
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"--only {pattern!r} names no measurement. Choose from: {', '.join(known)}.")
    return {name: one for name, one in known.items() if not patterns or any(fnmatchcase(name, at) for at in patterns)}


def measure(setting: Setting, one: Measurement) -> dict[str, Any]:
    """A measurement as speed.json keeps it."""
    began = time.perf_counter()
    found = one.run(setting)
    return {
        "caption": one.caption, "unit": one.unit,
        "arms": {name: summarized(samples) for name, samples in found.samples.items()},
        "ratios": [
            {**ratio._asdict(), **compared(ratio, found.samples)}
            for ratio in one.ratios
            if {ratio.arm, ratio.other} <= found.samples.keys()  # a model may have another vocabulary
        ],
        "notes": found.notes, "seconds": round(time.perf_counter() - began), "made_with": made_with(setting),
    }  # fmt: skip


def made_with(setting: Setting) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    return {
        "date": f"{datetime.date.today()}",
        "device": torch.cuda.get_device_name() if setting.device.type == "cuda" else processor,
        "threads": torch.get_num_threads(), "weights": str(setting.dtype), "rows": setting.described_rows,
        "attention": setting.base.config._attn_implementation,
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }  # fmt: skip


def measure_all(settings: dict[str, Setting], wanted: dict[str, Measurement], path: Path, again: bool) -> Measured:
    """Model -> measurement -> what was found; each is kept in the file before the next one begins."""
    kept: Measured = json.loads(path.read_text()) if path.exists() else {}
    for model, setting in settings.items():
        own = kept.setdefault(model, {})
        for name, one in wanted.items():
            if (name in own and not again) or (setting.model in SHAPES and not one.of_shapes):
                continue
            print(f"{model}: {name} ({one.caption}) ...", flush=True)
            own[name] = measure(setting, one)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(kept, indent=1))
            partial.replace(path)
            print(f"{model}: {name} took {own[name]['seconds']} s", flush=True)
            gc.collect()
    return kept


# ---- tables ---------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def seconds(value: float, unit: str) -> str:
    if unit == "MB":
        return f"{value:,.0f} MB"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def ratio_table(own: Measured) -> Table:
    rows = []
    for found in own.values():
        for one in found["ratios"]:
            by, target = one["by"], one["target"]
            met = "" if target is None else "yes" if one[by] <= target else "no"
            wanted = "" if target is None else f"{target:.2f} ({by})"
            spread = " to ".join(number(one[end]) for end in ("p10", "p90")) if "p10" in one else ""
            rows.append([one["what"], one["against"], number(one["median"]), number(one["mean"]), spread, wanted, met])
    header = ["what", "against", "median", "mean", "10th to 90th percentile", "target, at most", "met"]
    return Table("Ratios", "", header, rows)


def arm_table(own: Measured) -> Table:
    rows = []
    for name, found in own.items():
        for arm, one in found["arms"].items():
            unit = found["unit"] or ("MB" if arm.endswith("(MB)") else "s")
            values = [seconds(one[key], unit) for key in ("median", "mean", "p10", "p90")]
            rows.append([name, arm, *values, str(one["n"])])
    return Table("Samples", "", ["measurement", "arm", "median", "mean", "10th", "90th percentile", "n"], rows)


def floor_table(own: Measured) -> Table:
    """A time beside the larger of its two floors, and the share of the measured rate of operations that it reaches."""
    notes, rows = own["floor"]["notes"], []
    for name in (name for name in notes["operations"] if name in own):
        for arm, (by_operations, by_bytes) in floors(notes, name).items():
            mean = own[name]["arms"][arm]["mean"]
            times = [seconds(value, "s") for value in (mean, by_operations, by_bytes)]
            rows.append(
                [name, arm, *times, number(mean / max(by_operations, by_bytes), 1), f"{by_operations / mean:.0%}"]
            )
    header = ["measurement", "arm", "mean", "operations", "bytes", "times the floor", "share of the rate"]
    return Table("Floor", "", header, rows)


def tables(own: Measured) -> list[Table]:
    found = [ratio_table(own), arm_table(own), *([floor_table(own)] if "floor" in own else [])]
    return [table for table in found if table.rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--model", default="runs/smollm2", help="A folder (python examples/smollm2.py FOLDER).")
    parser.add_argument("--tofu", type=Path, help="Folder of TOFU's JSON lines; without it the package's people.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"Names or patterns: {', '.join(MEASUREMENTS)}.")
    parser.add_argument("--growth", action="store_true", help=f"How cost grows: {', '.join(POINTS)}.")
    parser.add_argument("--shapes", nargs="+", default=[], choices=SHAPES, help="Random weights instead of a model.")
    parser.add_argument("--steps", type=int, default=32, help="Steps that are counted.")
    parser.add_argument("--again", action="store_true", help="Measure what was measured, too.")
    given = parser.parse_args(argv)
    if given.tofu is not None and not given.tofu.is_dir():
        parser.error(
            f"--tofu is {str(given.tofu)!r}, but there is no such folder. Leave it out for the package's rows."
        )
    if given.steps < 1:
        parser.error(f"--steps is {given.steps}, but must be 1 or more.")
    known = POINTS if given.growth else MEASUREMENTS
    try:
        wanted = chosen(known, given.only)
    except ValueError as error:
        parser.error(str(error))
    common = {"output": given.output_dir, "tofu": given.tofu, "steps": given.steps}
    settings = {Path(given.model).name: Setting(given.model, **common)}
    if given.shapes:
        settings = {name: Setting(name, length=LENGTH, **common) for name in given.shapes}
    elif given.growth:
        settings = {"growth": Setting("shallow", **common)}
    elif not Path(given.model).is_dir():
        parser.error(
            f"--model is {given.model!r}, but there is no such folder: python examples/smollm2.py {given.model}"
        )
    given.output_dir.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    kept = measure_all(settings, wanted, given.output_dir / "speed.json", given.again)
    for model in settings:
        print(f"\n# {model}\n")
        for table in tables(kept[model]):
            print(to_markdown(table), "\n")
    for path in draw(kept.get("growth", {}), given.output_dir):
        print(f"plot: {path}")


if __name__ == "__main__":
    main()
