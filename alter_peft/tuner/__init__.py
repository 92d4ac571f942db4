# SPDX-License-Identifier: Apache-2.0
from alter_peft.registration import register

from .config import AlterConfig
from .layer import AlterLayer, AlterLinear
from .model import AlterModel
from .token_router import AlterRouter


__all__ = ["AlterConfig", "AlterLayer", "AlterLinear", "AlterModel", "AlterRouter"]

register(AlterConfig, AlterModel)
