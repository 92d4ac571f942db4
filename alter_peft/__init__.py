# SPDX-License-Identifier: Apache-2.0
"""Machine unlearning for language models as a PEFT adapter (ALTER, arXiv 2603.01792). Importing registers it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .peft_import import PEFT, register_when_imported
from .version import __version__


if TYPE_CHECKING:
    from .retain_rows import retain_auto
    from .trainer import AlterUnlearnConfig, AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer
    from .tuner import AlterConfig, AlterModel


# what is imported when it is asked for: the command line's help needs no torch, and who loads an adapter no TRL
_LAZY = {
    "AlterConfig": "tuner",
    "AlterModel": "tuner",
    "AlterUnlearnConfig": "trainer",
    "AlterUnlearnTrainer": "trainer",
    "UnlearnConfig": "trainer",
    "UnlearnTrainer": "trainer",
    "retain_auto": "retain_rows",
}

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
    """The names of `__all__` and the rooms that they are in, imported."""
    room = _LAZY.get(name, name)
    if room not in _LAZY.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # first PEFT, whose import ends with the tuner's: were it the other way round in a second thread, each could wait
    # for the other
    import_module(PEFT)
    module = import_module(f".{room}", __name__)
    return module if name == room else getattr(module, name)


def __dir__() -> list[str]:
    """What is there, and what `__getattr__` imports."""
    return sorted({*globals(), *__all__, *_LAZY.values()})


register_when_imported()
