# SPDX-License-Identifier: Apache-2.0
"""What was measured of one model, as a file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from alter_peft import __version__

from .measure import Score


STOPPED = "stopped before: "  # how the `error` of a cell begins whose run was interrupted


@dataclass
class Result:
    """
    One model of a benchmark, measured.

    name: of the method, `"target"` (before unlearning) or `"oracle"` (never saw the forget set).
    seed: of its training.
    scores: `"{set}/{metric}"` -> score.
    curves: `"{attack}/{set}/{metric}"` -> (x, value) points, x being steps, requests or seconds.
    seconds: what it took, by part: `"training"`, `"evaluation"`, ...
    skipped: attack -> why it does not apply to this model.
    settings: what it was made with, for the reader of the table.
    environment: date and package versions of the training (see `environment`).
    machine: of the training.
    machines: of each part in `seconds`, which are not to be compared across machines.
    error: why there are no scores, if the cell failed; what failed of the rest, if there are; `STOPPED` and what is
        still missing, if a run was interrupted.
    """

    name: str
    seed: int
    scores: dict[str, Score] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=lambda: machine())
    machines: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def save(self, path: Path) -> None:
        """Write it whole: beside the target first, then in its place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = asdict(self) | {"scores": {name: score._asdict() for name, score in self.scores.items()}}
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(data, indent=1))
        os.replace(partial, path)

    @property
    def broken(self) -> list[str]:
        """The scores that are no finite numbers, in their value or a row."""
        return [key for key, score in self.scores.items() if not all(map(math.isfinite, (score.value, *score.rows)))]

    @property
    def failed(self) -> bool:
        """Whether there is an error and nothing that was measured; a run that was interrupted is no error."""
        return self.error is not None and not self.error.startswith(STOPPED) and not self.scores

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` has written."""
        data = json.loads(path.read_text())
        data["scores"] = {name: Score(**score) for name, score in data["scores"].items()}
        data["curves"] = {name: [(x, y) for x, y in points] for name, points in data["curves"].items()}
        return cls(**data)


def machine() -> str:
    """What the figures are made on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def environment() -> dict[str, str]:
    """Today's date, and the versions of the packages that make the figures."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {"date": date.today().isoformat(), "alter_peft": __version__, **versions}


def _cpu() -> str:
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else []
    return names[0] if names else platform.machine()
