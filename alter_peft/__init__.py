# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Machine unlearning for language models as a PEFT adapter (ALTER, arXiv 2603.01792). Importing registers it."""

from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"  # before the imports: AlterConfig writes it into what it saves

from .tuner import AlterConfig, AlterModel


if TYPE_CHECKING:
    from .trainer import AlterUnlearnConfig, AlterUnlearnTrainer


__all__ = ["AlterConfig", "AlterModel", "AlterUnlearnConfig", "AlterUnlearnTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """The trainer's names, imported when they are asked for: who loads an adapter needs no TRL."""
    if name in ("AlterUnlearnConfig", "AlterUnlearnTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
