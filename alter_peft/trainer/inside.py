# SPDX-License-Identifier: Apache-2.0
"""What a model has inside at the tokens of a batch, and what its base has there: last hidden states, activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from alter_peft.scoring import ScoredModel


class Seen(NamedTuple):
    """
    hidden: the decoder's last hidden states but for the last position, (B, T-1, k).
    activations: what the layer gives there, (B, T-1, k); `None` where no layer is looked at.
    """

    hidden: Tensor
    activations: Tensor | None = None

    def at(self, chosen: Tensor) -> Seen:
        """The same at the chosen tokens, bool (B, T-1): (n, k) each."""
        return Seen(self.hidden[chosen], None if self.activations is None else self.activations[chosen])


@contextmanager
def tapped(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Inside, what the layer gives in every pass is collected, (B, T, k) each."""
    found: list[Tensor] = []
    if layer is None:
        yield found
        return
    with layer.register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    ):
        yield found


def copied(model: Any) -> Any:
    """A base model of its own: a deep copy, without the adapter."""
    base: Any = copy.deepcopy(model)
    if isinstance(model, PeftModel):
        base = base.unload()
    vars(base).pop("forward", None)  # TRL's, which is bound to the original
    return base


class Base:
    """
    The base model beside the one that is trained: under its adapter, or a frozen copy where all weights are trained.

    Args:
        scored: the model that is trained.
        layer: the place of the decoder layer that is looked at, if one is.
        needs_copy: whether there is no adapter that could be left out.
    """

    def __init__(self, scored: ScoredModel, layer: int | None, needs_copy: bool) -> None:
        self.scored, self.layer = scored, layer
        # in a tuple: no child of a module, nothing that is trained or saved
        self._frozen: tuple[ScoredModel, ...] = ()
        if needs_copy:
            self._frozen = (ScoredModel(copied(scored.model).requires_grad_(False).eval()),)

    @property
    def head(self) -> Any:
        """Of the base model: hidden states -> logits."""
        return self._frozen[0].head if self._frozen else self.scored.head

    def see(self, input_ids: Tensor, attention_mask: Tensor) -> Seen:
        """What the base model makes of these rows, without gradients."""
        if self._frozen:
            with torch.no_grad():
                return self._pass(self._frozen[0], input_ids, attention_mask)
        with self.scored.as_base():
            return self._pass(self.scored, input_ids, attention_mask)

    def _pass(self, scored: ScoredModel, input_ids: Tensor, attention_mask: Tensor) -> Seen:
        with tapped(None if self.layer is None else scored.stack.layers[self.layer]) as found:
            hidden = scored.base_hidden_states(input_ids, attention_mask)
        return Seen(hidden[:, :-1], found[0][:, :-1] if found else None)


def layer_at(depth: float, scored: ScoredModel) -> int:
    """
    The place, from 0, of the decoder layer at this depth, a share of all.

    Raises:
        ValueError: nothing that is trained lies at or below it, so that its activations would stay as they are.
    """
    layers = scored.stack.layers
    place = int(depth * len(layers))
    if not any(weight.requires_grad for layer in layers[: place + 1] for weight in layer.parameters()):
        first = next(
            (i for i, layer in enumerate(layers) if any(weight.requires_grad for weight in layer.parameters())), None
        )
        trained = "the decoder's layers are frozen" if first is None else f"what is trained begins at layer {first}"
        raise ValueError(
            f"`activation_depth` is {depth}, layer {place} of {len(layers)}, but {trained}: its activations would "
            "stay as they are. Raise it, or train lower layers."
        )
    return place
