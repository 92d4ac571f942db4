# SPDX-License-Identifier: Apache-2.0
from alter_peft.registration import register, save_by

from .config import AlterConfig
from .layer import AlterLayer, AlterLinear
from .model import AlterModel
from .saving import save_through
from .token_router import AlterRouter


__all__ = ["AlterConfig", "AlterLayer", "AlterLinear", "AlterModel", "AlterRouter"]

register(AlterConfig, AlterModel)
save_by(save_through)
