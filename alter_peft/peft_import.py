# SPDX-License-Identifier: Apache-2.0
"""
PEFT is told of ALTER whenever it is imported, before or after this package, and nothing heavy is imported for that.

Importing PEFT takes seconds. Where it is there already, the tuner is imported at once, which registers itself; else as
the last step of PEFT's own import. So `alter_peft` is imported in milliseconds, and in whichever order the two are
imported, PEFT knows ALTER by the end of both lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.version import Version


PEFT, TUNER = "peft", "alter_peft.tuner"
# The range of PEFT versions that the test-suite passes with
OLDEST_PEFT, BEFORE_PEFT = Version("0.21.0"), Version("0.22.0")


def check_peft_version(installed: str) -> None:
    """Raise an `ImportError` if this PEFT version is outside the tested range."""
    if not OLDEST_PEFT <= Version(installed) < BEFORE_PEFT:
        raise ImportError(
            f"alter-peft extends PEFT's internals and is tested with peft>={OLDEST_PEFT},<{BEFORE_PEFT}, but found "
            f"peft=={installed}. Install a tested version: pip install 'peft>={OLDEST_PEFT},<{BEFORE_PEFT}'."
        )


class _ThenTuner(Loader):
    """PEFT's own loader, and then the import of the tuner."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # as `importlib.util.LazyLoader` does it: whoever asks the module for its loader is given its own
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
        import_module(TUNER)

    def __getattr__(self, name: str) -> Any:
        """What else a loader has, its source and resources, for those who look up PEFT without importing it."""
        return getattr(self.loader, name)


class _PeftFinder(MetaPathFinder):
    """Finds PEFT where it would be found without this, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PEFT:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenTuner(spec.loader)
        return spec


_FINDER = _PeftFinder()


def register_when_imported() -> None:
    """Register ALTER with PEFT now if PEFT is imported, or is just being imported; else as soon as it is."""
    check_peft_version(metadata.version(PEFT))
    if PEFT in sys.modules:
        import_module(TUNER)
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
