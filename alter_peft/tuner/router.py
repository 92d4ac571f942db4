# SPDX-License-Identifier: Apache-2.0
"""The router of Eq. 7: what the gates of a token depend on, and how they follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


ROUNDING = torch.finfo(torch.float32).eps  # a gate nearer to 0 or to 1 than this is 0 or 1


def gate(
    logits: Tensor,
    high: Tensor | None,
    temperature_high: float,
    temperature_low: float,
    top_k: int,
    retain_competes: bool = True,
) -> Tensor:
    """
    Eq. 7: softmax(z / tau(S)), with tau = `temperature_high` on high-entropy tokens, which keep the retain expert and
    their `top_k` best forget experts (renormalised), and `temperature_low`, nearly one-hot, on the others. There a
    gate within float32's rounding of 0 or 1 is 0 or 1: one expert has the whole token (Eq. 9), unless two are nearly
    even (at .01, if their z differ by less than .16).

    Args:
        logits: z of the experts that compete, (..., 1+N), retain expert first, or (..., N).
        high: bool (...), S > threshold; `None` if no token counts as high.
        retain_competes: whether the retain expert is one of them; if not, its gate is 1 (Eqs. 6 and 9).

    Returns:
        gates g, (..., 1+N), those of the experts that compete summing to 1.
    """
    gates = _softmax(logits, high, temperature_high, temperature_low, top_k, int(retain_competes))
    return gates if retain_competes else F.pad(gates, (1, 0), value=1.0)


def _softmax(
    logits: Tensor, high: Tensor | None, temperature_high: float, temperature_low: float, top_k: int, kept: int
) -> Tensor:
    """The first `kept` experts, none or one, stay beside the `top_k` best of the others."""
    low_gates = F.threshold((logits / temperature_low).softmax(dim=-1), ROUNDING, 0.0)
    low_gates = low_gates.masked_fill(low_gates > 1 - ROUNDING, 1.0)
    if high is None:
        return low_gates
    probabilities = (logits / temperature_high).softmax(dim=-1)
    forget = probabilities[..., kept:]
    best = forget.topk(min(top_k, forget.shape[-1]), dim=-1).indices
    keep = torch.zeros_like(probabilities).scatter(-1, best + kept, 1.0)
    keep[..., :kept] = 1.0
    left = probabilities * keep
    return torch.where(high.unsqueeze(-1), left / left.sum(dim=-1, keepdim=True), low_gates)


def logits_of(features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """
    z_t = W x_t + b, or of a router with a hidden layer z_t = W relu(V x_t + c) + b; in float32.

    Args:
        features: x_t, (..., features).
        weights: `weight` W and perhaps `bias` b; perhaps `hidden_weight` V, (units, features), and `hidden_bias` c.

    Returns:
        (..., outputs)
    """
    if "hidden_weight" in weights:
        hidden = F.linear(features, weights["hidden_weight"].float(), weights["hidden_bias"].float())
        features = hidden.relu()
    bias = weights.get("bias")
    return F.linear(features, weights["weight"].float(), None if bias is None else bias.float())


class Router(ABC):
    """
    What the gates depend on: z_t = `logits_of` the features x_t of a subclass. The weights are fitted in phase I.

    An entry of `ROUTERS` says of itself what `AlterConfig`, its help and phase I need to know.

    caption: one sentence for the help, after the router's name.
    is_gated: whether the gates depend on the token at all.
    entropy_sources: values that `inference_entropy` may have, the default first.
    has_bias: whether there is a b.
    retain_competes: whether the retain expert has an output, too, and a gate between 0 and 1; if not, its gate is 1.
    reads_context: whether x_t says what a text is about, so that a hidden layer and rows about other subjects help.
    """

    caption: str
    is_gated: bool = True
    entropy_sources: tuple[Literal["none", "base"], ...] = ("none", "base")
    has_bias: bool = True
    retain_competes: bool = True
    reads_context: bool = True

    def num_outputs(self, num_forget_experts: int) -> int:
        """Entries of z: 1 + N, or N."""
        return num_forget_experts + int(self.retain_competes)

    def competing(self, gates: Tensor) -> Tensor:
        """Gates g (..., 1+N) whose greatest is the expert that a token is sent to: 0 for one that doesn't compete."""
        return gates if self.retain_competes else F.pad(gates[..., 1:], (1, 0))

    @abstractmethod
    def num_features(self, width: int) -> int:
        """Entries of x_t where the residual stream has `width`."""

    @abstractmethod
    def features(self, average: Tensor, entropy: Tensor | None, threshold: float | None) -> Tensor:
        """
        x_t of every position, float32.

        Args:
            average: c_t, (..., k).
            entropy: S_q, (...); `None` where it isn't known.
            threshold: of the entropy; `None` if it isn't known yet.
        """


class ContextRouter(Router):
    """x_t = [c_t ; S_t - threshold]; an unknown S counts as one at the threshold."""

    caption = "gates each token by the moving average of the residual stream and its entropy"

    def num_features(self, width: int) -> int:
        return width + 1

    def features(self, average: Tensor, entropy: Tensor | None, threshold: float | None) -> Tensor:
        unknown = average.new_zeros(average.shape[:-1])
        surprise = unknown if entropy is None else above_threshold(entropy, threshold)
        return torch.cat([average, surprise.unsqueeze(-1)], dim=-1)


class EntropyRouter(Router):
    """
    x_t = S_t, and the retain expert outside of the softmax: the letter of Eqs. 6, 7 and 9. It cannot tell sub-domains
    apart (design), and is here for the ablation.
    """

    caption = (
        "is the letter of Eqs. 7 and 9, for ablations: S_q alone gates the forget experts, and the retain expert acts "
        "on every token at weight 1"
    )
    entropy_sources = ("base",)
    has_bias = False
    retain_competes = False
    reads_context = False

    def num_features(self, width: int) -> int:
        return 1

    def features(self, average: Tensor, entropy: Tensor | None, threshold: float | None) -> Tensor:
        if entropy is None:
            raise ValueError("`router='entropy'` needs S_q; set `inference_entropy='base'`.")
        return entropy.float().unsqueeze(-1)


class EntropyRouterOfFormat1(EntropyRouter):
    """The entropy router of adapters of format version 1, where the retain expert competed in the softmax."""

    retain_competes = True


class StaticRouter(Router):
    """No gates: the experts have fixed weights."""

    caption = "uses fixed `expert_weights` (AsymLoRA, Eqs. 2 and 6) and works on any model with linear layers"
    is_gated = False
    entropy_sources = ("none",)
    reads_context = False

    def num_features(self, width: int) -> int:
        return 0

    def features(self, average: Tensor, entropy: Tensor | None, threshold: float | None) -> Tensor:
        return average[..., :0]


ROUTERS: dict[str, Router] = {
    "context": ContextRouter(),
    "entropy": EntropyRouter(),
    "static": StaticRouter(),
}
_OF_FORMAT_1: dict[str, Router] = {"entropy": EntropyRouterOfFormat1()}


def router_of(name: str, format_version: int) -> Router:
    """The router of this name in adapters of this format version."""
    return _OF_FORMAT_1.get(name, ROUTERS[name]) if format_version == 1 else ROUTERS[name]


def above_threshold(entropy: Tensor, threshold: float | None) -> Tensor:
    """S_q - threshold, float32; a `ValueError` if no threshold was measured yet."""
    if threshold is None:
        raise ValueError(
            "`entropy_threshold` is not known yet: with `entropy_quantile` it is measured by the trainer. "
            "Train the adapter first or set `entropy_threshold`."
        )
    return entropy.float() - threshold
