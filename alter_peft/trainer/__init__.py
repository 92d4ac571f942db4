# SPDX-License-Identifier: Apache-2.0
from .config import AlterUnlearnConfig
from .trainer import AlterUnlearnTrainer


__all__ = ["AlterUnlearnConfig", "AlterUnlearnTrainer"]
