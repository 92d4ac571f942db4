# SPDX-License-Identifier: Apache-2.0
from .alter import AlterUnlearnTrainer
from .config import AlterUnlearnConfig, UnlearnConfig
from .unlearn import UnlearnTrainer


__all__ = ["AlterUnlearnConfig", "AlterUnlearnTrainer", "UnlearnConfig", "UnlearnTrainer"]
