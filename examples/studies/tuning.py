# SPDX-License-Identifier: Apache-2.0
"""
Equal tuning: the same grid around the defaults of every method, chosen on the rows that ALTER's own were chosen on.

    python examples/studies/tuning.py runs/tuning --methods lora_npo lora_simnpo

The data are the demo's rows (examples/demo_data), so that no method is tuned on people, hazard or TOFU; of its
held-out rows one half is for calibration, the other for membership. A method's rate is halved and doubled, the weight
of its retained rows 1 and 4 times what it was, its epochs 1 and 2 times: 8 runs beside the defaults, of one seed.
Where retained rows have no weight, the rate is also a fourth and fourfold; where the training ends at targets, the
tolerance is 1 and half of what it was in place of the epochs. SimNPO has its grid around what others found best for
it (PUBLISHED), which is run as well, beside the defaults. The best one has the largest harmonic mean of forgetting
and utility (docs/report.md). What it was made with goes into OUTPUT/tuned.yaml, as `METHOD+tuned` among the `options`
of a grid. `--defaults_alone` leaves out the eight runs: what methods do untuned, side by side. OUTPUT/grid.yaml
is for others that join them (examples/studies/controls.py). A run resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.benchmark.methods import METHODS
from alter_peft.evaluation.tables import Table, to_markdown
from alter_peft.report.balance import Balance
from alter_peft.report.reading import read_benchmark
from alter_peft.trainer import UnlearnConfig


# What each option of a method's is multiplied by, and what takes its place where it does nothing
FACTORS = {"learning_rate": (0.5, 2.0), "retain_weight": (1.0, 4.0), "num_train_epochs": (1.0, 2.0)}
MORE_RATES = (0.25, 0.5, 2.0, 4.0)
TOLERANCES = (1.0, 0.5)
# What a grid is around in place of the defaults: where others found SimNPO at its best
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"forget_loss_kwargs": {"beta": 3.5, "delta": 1.0}} for name in METHODS if name.endswith("simnpo")
}
Scores = dict[str, tuple[float | None, ...]]  # by run
DATA = Path(__file__).parents[1] / "demo_data"
# Each part: the demo's file, and which of its rows
PARTS = {
    "forget": ("forget", slice(None)),
    "retain": ("retain", slice(None)),
    "bystanders": ("bystanders", slice(None)),
    "calibration": ("holdout", slice(0, None, 2)),
    "holdout": ("holdout", slice(1, None, 2)),
}


def write_rows(folder: Path) -> dict[str, str]:
    """The rows of each part as a file, and where it lies."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for part, (name, rows) in PARTS.items():
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[rows]
        found[part] = str(folder / f"{part}.jsonl")
        Path(found[part]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def factors_of(defaults: UnlearnConfig) -> dict[str, tuple[float, ...]]:
    """What each option is multiplied by: eight choices together, all of them different trainings."""
    found: dict[str, tuple[float, ...]] = dict(FACTORS)
    if defaults.retain_weight == 0:
        del found["retain_weight"]
        found["learning_rate"] = MORE_RATES
    if defaults.loss.has_targets and defaults.stopping_tolerance is not None:
        del found["num_train_epochs"]
        found["stopping_tolerance"] = TOLERANCES
    return found


def variants(name: str) -> dict[str, dict[str, Any]]:
    """The grid of a method: its defaults, and what they become under each choice of factors."""
    method = METHODS[name]
    defaults = method.trainer.config_class(output_dir="", **method.options)
    choices = factors_of(defaults)
    own = {option: getattr(defaults, option) for option in choices}
    found: dict[str, dict[str, Any]] = {name: {}}
    if name in PUBLISHED:
        found[f"{name}+published"] = PUBLISHED[name]
    for factors in itertools.product(*choices.values()):
        label = "-".join(f"{factor:g}" for factor in factors)
        values = zip(own.items(), factors, strict=True)
        scaled = {option: value * factor for (option, value), factor in values}
        found[f"{name}+{label}"] = {**PUBLISHED.get(name, {}), **scaled}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--model", default="runs/smollm2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--defaults_alone", action="store_true", help="No grid, and nothing is chosen.")
    given = parser.parse_args()
    options: dict[str, dict[str, Any]] = {}
    for name in given.methods:
        options |= {name: {}} if given.defaults_alone else variants(name)
    config: dict[str, Any] = {
        "model": given.model, "output_dir": str(given.output_dir), "oracle_seeds": [0, 1],
        "task_data": {"rows": write_rows(given.output_dir / "rows")}, "answered": 4, "max_new_tokens": 24,
        "options": {"teach": {"num_train_epochs": 6}},
    }  # fmt: skip
    (given.output_dir / "grid.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    config["options"] |= {name: own for name, own in options.items() if own}
    Grid(BenchmarkArguments(**config, methods=list(options))).run()
    scores = scored(given.output_dir)
    report(scores, options)
    if not given.defaults_alone:
        choose(given.output_dir / "tuned.yaml", scores, options)


def scored(folder: Path) -> Scores:
    """Of every run, what it is chosen for, and what that is the harmonic mean of: forgetting and utility."""
    benchmark = read_benchmark(folder)
    balance = Balance(benchmark)
    return {
        model.name: (balance.both(values), balance.forgetting(values), balance.utility(values))
        for model in benchmark.methods
        for values in model.values[:1]
    }


def report(scores: Scores, options: dict[str, dict[str, Any]]) -> None:
    """Print a line for each run."""
    rows = [
        [name, json.dumps(own), *("" if value is None else f"{value:.3f}" for value in scores.get(name, (None,) * 3))]
        for name, own in options.items()
    ]
    print(to_markdown(Table("Tuning", "", ["run", "options", "both", "forgetting", "utility"], rows)))


def choose(path: Path, scores: Scores, options: dict[str, dict[str, Any]]) -> None:
    """Write the best run's options of each method to a file, beside those of methods that were tuned before."""
    methods = dict.fromkeys(name.partition("+")[0] for name in options)
    before = yaml.safe_load(path.read_text()).get("options", {}) if path.is_file() else {}
    tuned = {name: own for name, own in before.items() if name.partition("+")[0] not in methods}  # of other runs
    for method in methods:
        runs = [name for name in options if name.partition("+")[0] == method and name in scores]
        best = max(runs, key=lambda name: scores[name][0] or 0.0, default=None)
        if best is not None:
            tuned[f"{method}+tuned"] = options[best]
    path.write_text(yaml.safe_dump({"options": tuned}, sort_keys=False))


if __name__ == "__main__":
    main()
