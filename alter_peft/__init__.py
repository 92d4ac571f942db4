# SPDX-License-Identifier: Apache-2.0
"""Machine unlearning for language models as a PEFT adapter (ALTER, arXiv 2603.01792). Importing registers it."""

import importlib
from typing import TYPE_CHECKING, Any

from .tuner import AlterConfig, AlterModel
from .version import __version__


if TYPE_CHECKING:
    from .retain_rows import retain_auto
    from .trainer import AlterUnlearnConfig, AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer


# what is imported when it is asked for: who loads an adapter needs no TRL
_OF_TRAINER = ("AlterUnlearnConfig", "AlterUnlearnTrainer", "UnlearnConfig", "UnlearnTrainer")

__all__ = [
    "AlterConfig",
    "AlterModel",
    "AlterUnlearnConfig",
    "AlterUnlearnTrainer",
    "UnlearnConfig",
    "UnlearnTrainer",
    "__version__",
    "retain_auto",
]


def __getattr__(name: str) -> Any:
    """The trainers and their names, and `retain_auto`."""
    if name == "retain_auto":
        return importlib.import_module(".retain_rows", __name__).retain_auto
    if name not in ("trainer", *_OF_TRAINER):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = importlib.import_module(".trainer", __name__)
    return trainer if name == "trainer" else getattr(trainer, name)


def __dir__() -> list[str]:
    """What is there, and what `__getattr__` imports."""
    return sorted({*globals(), *__all__, "trainer"})
