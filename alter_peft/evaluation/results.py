# SPDX-License-Identifier: Apache-2.0
"""What was measured of one model, as a file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from alter_peft.version import __version__

from .scores import Key, Scores


TARGET, ORACLE = "target", "oracle"  # the names of what is no method: before unlearning, and never saw the forget set
STOPPED = "stopped before: "  # how the `error` of a model begins whose run was interrupted


@dataclass
class Result:
    """
    One model, measured.

    Attributes:
        name: of the method, `TARGET` or `ORACLE`.
        seed: of its training.
        scores: see [`Scores`]; each says by itself which settings it depends on.
        seconds: what it took, by part: `"training"`, `"evaluation"`, ...
        skipped: attack, or a part of one -> why it does not apply to this model.
        settings: what it was made with, for the reader of the table.
        environment: date and package versions of the training (see `environment`).
        machine: of the training.
        machines: of each part in `seconds`, which are not to be compared across machines.
        error: why there are no scores, if the model failed; what failed of the rest, if there are; `STOPPED` and what
            is still missing, if a run was interrupted.
    """

    name: str
    seed: int
    scores: Scores = field(default_factory=Scores)
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
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**vars(self), "scores": self.scores.to_list()}, indent=1))
        os.replace(partial, path)

    @property
    def broken(self) -> list[Key]:
        """The scores that are no finite numbers, in their value or a row."""
        return [key for key, score in self.scores.items() if not score.is_finite]

    @property
    def is_measured(self) -> bool:
        """Whether the model was measured, and not only what requests on the way to it left."""
        return len(self.scores) > len(self.scores.after_requests)

    @property
    def failed(self) -> bool:
        """Whether there is an error and no usable score of the model; a run that was interrupted is no error."""
        stopped = self.error is None or self.error.startswith(STOPPED)
        return not stopped and (not self.is_measured or bool(self.broken))

    @classmethod
    def load(cls, path: Path) -> Result:
        """
        Read what `save` has written.

        Raises:
            ValueError: the file is something else, such as a result of another version.
        """
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict) or not isinstance(data.get("scores"), list):
                raise TypeError("it has no list of `scores`")
            return cls(**{**data, "scores": Scores.from_list(data["scores"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"'{path}' is no result ({error}). Remove it, and measure the model again.") from error


def machine() -> str:
    """What the figures are made on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def environment() -> dict[str, str]:
    """Today's date, and the versions of the packages that make the figures."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {"date": date.today().isoformat(), "alter_peft": __version__, **versions}
