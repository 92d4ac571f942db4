# SPDX-License-Identifier: Apache-2.0
"""What a decoder was called with: its cache, which of its tokens are padding, and which text each belongs to."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin


# What callers name packed rows by, beside the `position_ids` that say the same
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_sequence_mask")


class Tokens(NamedTuple):
    """
    The tokens of one pass of a decoder.

    valid: bool (B, T), False at padding; `None` if there is none.
    text: (B, T), the number of the text in its row that each token belongs to; `None` if a row is one text.
    """

    valid: Tensor | None = None
    text: Tensor | None = None


class DecoderCall:
    """
    Reads the arguments of a decoder's `forward`.

    Args:
        masks_are_made: whether the model makes (B, 1, T, cached length) masks itself, also without a static cache.

    Attributes:
        cache_name: the argument that holds the KV cache, or a state-space model's states; `None` if there is none.
    """

    def __init__(self, decoder: nn.Module, masks_are_made: bool) -> None:
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        self._masks_are_made = masks_are_made
        self.cache_name = next((name for name in ("past_key_values", "cache_params") if name in self._names), None)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def cache(self, given: dict[str, Any]) -> Cache | None:
        """The KV cache among the arguments."""
        return None if self.cache_name is None else given.get(self.cache_name)

    def tokens(self, given: dict[str, Any]) -> Tokens:
        """
        Padding, and the text of each token.

        Raises:
            ValueError: rows that hold several texts where it cannot be told which, or a mask of the caller's own
                making, which may hide such rows.
        """
        cache = self.cache(given)
        # the base model, too, keeps texts apart only where they are packed without a 2-d mask
        text = _text(given.get("position_ids")) if given.get("attention_mask") is None else None
        named = [name for name in PACKING if given.get(name) is not None]
        if named:
            text = _text(given.get("position_ids"))
            if text is None or given.get("cache") is not None:  # a cache of many requests (continuous batching)
                raise ValueError(
                    f"A gated router needs one text a row, but the decoder was given packed rows (`{named[0]}`, as "
                    "continuous batching and padding-free training make them). Use `generate` or a padded batch, give "
                    "`position_ids` that restart with each text, or use `AlterConfig(router='static')`."
                )
        return Tokens(self._valid(given, cache), text)

    def _valid(self, given: dict[str, Any], cache: Cache | None) -> Tensor | None:
        """
        Which tokens are no padding, from the attention mask in any of its forms.

        Most decoders are given (B, at least T): a column a position of the cache, those to come included if it is
        static. `generate` makes (B, 1, T, cached length) for a static cache, as vision-language models do for their
        text decoder; hybrid models have one for each kind of layer. In those a token that is no padding attends to
        itself.
        """
        mask = given.get("attention_mask")
        masks_are_made = self._masks_are_made or (cache is not None and cache.is_compileable)
        if isinstance(mask, dict):
            mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
            masks_are_made = True
        if mask is None:
            return None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            inputs = given.get("input_ids")
            length = (given["inputs_embeds"] if inputs is None else inputs).shape[1]
            return _at(mask, length, _seen(cache)).bool()
        if not (isinstance(mask, Tensor) and mask.dim() == 4 and masks_are_made):
            raise ValueError(
                "A gated router needs the (batch, length) `attention_mask`, but the decoder was given "
                f"{f'one of shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__}. "
                "Pass that mask instead, or use `AlterConfig(router='static')`."
            )
        length, width = mask.shape[2:]
        index = torch.arange(length, device=mask.device)
        seen = 0 if cache is None else cache.get_seq_length()
        # a sliding window keeps the last columns alone
        column = torch.minimum(index + seen, index + (width - length))
        itself = mask[:, 0].gather(-1, column.view(1, length, 1).expand(mask.shape[0], length, 1)).squeeze(-1)
        return itself if itself.dtype == torch.bool else itself == 0  # a float mask is added to the scores


def _seen(cache: Cache | None) -> Any:
    """Positions in the cache, an int, or a tensor for a static one; `None` if no layer of it counts them."""
    if cache is None:
        return 0
    counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) or not cache.layers
    return cache.get_seq_length() if counts else None


def _at(mask: Tensor, length: int, seen: Any) -> Tensor:
    """The columns (B, T) of the present tokens in a mask (B, at least T)."""
    last = mask.shape[1] - length  # where they begin if the mask ends with them
    if last <= 0 or seen is None:
        return mask[:, -length:]
    if isinstance(seen, Tensor):
        columns = torch.arange(length, device=mask.device) + seen.to(mask.device).clamp(max=last)
        return mask.gather(1, columns.expand(mask.shape[0], length))
    start = min(seen, last)
    return mask[:, start : start + length]


def _text(positions: Tensor | None) -> Tensor | None:
    """The number of each token's text, which begins where positions don't go on by one, as transformers has it."""
    if positions is None:
        return None
    if positions.dim() == 3:  # of vision-language models: text, time, height, width; without the first, no packing
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    positions = torch.atleast_2d(positions)
    steps = positions.diff(dim=-1, prepend=positions[:, :1] - 1)
    return (steps != 1).cumsum(dim=-1)
