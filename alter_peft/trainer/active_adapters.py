# SPDX-License-Identifier: Apache-2.0
"""Several active adapters: the first is trained, and the others act beside it as they will when the model is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper

from alter_peft.scoring import ScoredModel
from alter_peft.tuner.layer import layers_of


def check_active_together(model: PeftModel) -> None:
    """
    Raise a `ValueError` if adapters that are active together keep a router from what it is fitted on, or if what one
    of those that are not trained has cannot be frozen.

    Args:
        model: whose first active adapter is to be trained.
    """
    trained, *beside = model.active_adapters
    configs: Any = {name: model.peft_config[name] for name in model.active_adapters}
    for name in beside:
        if configs[name].bias != "none":
            raise ValueError(
                f"`bias` of adapter {name!r}, which is active too, is {configs[name].bias!r}: the biases are the base "
                f"model's, and all adapters train them. Activate {name!r} after the training."
            )
        own, other = configs[trained].entropy_q, configs[name].entropy_q
        if configs[name].is_gated and configs[name].inference_entropy == "base" and own != other:
            raise ValueError(
                f"`entropy_q` is {own}, but adapter {name!r}, which is active too and takes the base model's entropies"
                f" (`inference_entropy='base'`), has {other}. Give both the same, or activate {name!r} after the "
                "training."
            )
    if not beside or not any(config.is_gated for config in configs.values()):
        return
    base: Any = model.get_base_model()
    if isinstance(base.get_input_embeddings(), AuxiliaryTrainingWrapper):
        raise ValueError(
            f"`modules_to_save` or `trainable_token_indices` of one of the active adapters {list(configs)} has the "
            "embeddings, which the router of another reads the effect of. Activate the others after the training."
        )
    layers = list(ScoredModel(model).stack.layers)
    depths = {name: next((i for i, one in enumerate(layers) if layers_of(one, name)), len(layers)) for name in configs}
    for name, config in configs.items():
        for other, depth in depths.items():
            if config.is_gated and other != name and depth < config.router_layer:
                raise ValueError(
                    f"`router_layer` of adapter {name!r} is {config.router_layer}, but adapter {other!r}, which is "
                    f"active too, adapts layer {depth}, so that the router would read other states than it is fitted "
                    f"on. Let it adapt layers from {config.router_layer} up (`layers_to_transform`), or activate one "
                    "alone."
                )


@contextmanager
def others_frozen(model: Any) -> Iterator[None]:
    """Freezes the active adapters of a model but the first; an error inside leaves it as it was."""
    beside = list(model.active_adapters[1:]) if isinstance(model, PeftModel) else []
    learning = [weight for weight in model.parameters() if weight.requires_grad] if beside else []
    if beside:
        model.set_requires_grad(beside, requires_grad=False)
    try:
        yield
    except BaseException:
        for weight in learning:
            weight.requires_grad_(True)
        raise


class Trained:
    """
    Which adapters and weights a trainer trains: PEFT's contexts and switches change both on their way.

    Args:
        model: as it is to be trained.
    """

    def __init__(self, model: Any) -> None:
        self.adapters: list[str] = list(model.active_adapters) if isinstance(model, PeftModel) else []
        self._frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}

    def activate(self, model: Any) -> None:
        """All of them again, the first alone to learn: a checkpoint that is loaded leaves that one alone active."""
        if len(self.adapters) > 1:
            model.base_model.set_adapter([*self.adapters])
            model.set_requires_grad(self.adapters[1:], requires_grad=False)

    def keep(self, model: Any) -> None:
        """
        What was frozen is frozen again: `model.disable_adapter()` lets all active adapters learn at its end.

        Raises:
            ValueError: other adapters are active by now, or nothing learns any more.
        """
        active = list(model.active_adapters) if self.adapters else []
        if active != self.adapters:
            fix = f"`model.set_adapter({self.adapters[0]!r})`"
            if len(self.adapters) > 1:
                fix = f"`model.base_model.set_adapter({self.adapters})`"
            raise ValueError(
                f"`model` has the active adapters {active}, but this trainer was made to train {self.adapters[0]!r} "
                f"with {self.adapters} active. Call {fix} first, or make another trainer."
            )
        learns = False
        for name, weight in model.named_parameters():
            if weight.requires_grad and name in self._frozen:
                weight.requires_grad_(False)
            learns = learns or weight.requires_grad
        if not learns:
            raise ValueError(
                "`model` has no weight that learns any more: its adapter was disabled or frozen after the trainer was "
                "made. Call `model.base_model.enable_adapter_layers()` first, or make another trainer."
            )


def own_folder(folder: Path | str, adapter_name: str) -> Path:
    """Where PEFT keeps an adapter in a folder that a model was saved to."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def load_own(model: PeftModel, folder: Path | str, adapter_name: str) -> None:
    """
    Load the trained adapter from a checkpoint; transformers takes any that it finds there for the active one.

    Raises:
        ValueError: the checkpoint is of another adapter.
    """
    own = own_folder(folder, adapter_name)
    if not (own / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"The checkpoint {str(folder)!r} has no adapter {adapter_name!r} (no {own / SAFETENSORS_WEIGHTS_NAME}). "
            "Resume with the adapter active first that the checkpoint was trained with."
        )
    model.load_adapter(str(own), adapter_name, is_trainable=True)
