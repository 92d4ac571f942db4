# SPDX-License-Identifier: Apache-2.0
"""The second term of Eq. 8: what retained text is to stay like. One dict has all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alter_peft.entropy import divergence, log_probabilities, map_row_chunks

from .scores import TokenScores


class RetainBatch(NamedTuple):
    """
    The labelled tokens of a batch's retain rows.

    Attributes:
        scores: see [`TokenScores`], (n,).
        hidden: the model's final hidden states, (n, k).
        base_hidden: those of the base model, (n, k); `None` for a loss that does not need them.
        head: maps hidden states (c, k) to logits (c, V).
        base_head: the base model's; `None` where it is the same.
        activations, base_activations: what the layer at `activation_depth` gives, in the model and its base, (n, k);
            `None` for a loss that does not need them.
    """

    scores: TokenScores
    hidden: Tensor
    base_hidden: Tensor | None
    head: Callable[[Tensor], Tensor]
    base_head: Callable[[Tensor], Tensor] | None = None
    activations: Tensor | None = None
    base_activations: Tensor | None = None


def cross_entropy_loss(scores: TokenScores) -> Tensor:
    """Cross-entropy of the labels, L_retain of Eq. 8: -ln p(x_t).

    Args:
        scores: see [`score_tokens`].

    Returns:
        The loss of each token in nats, shape (n,).
    """
    return -scores.log_prob


def kl_to_base_loss(
    hidden: Tensor,
    base_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk_size: int = 256,
    base_head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Divergence of the adapted model from the base, an option for L_retain of Eq. 8.

    KL(p_base || p) = sum_v p_base(v) (ln p_base(v) - ln p(v)). No gradient flows into the base's side.

    Args:
        hidden: the adapted model's final hidden states, shape (n, k); n may be 0.
        base_hidden: the base model's, shape (n, k).
        head: maps hidden states (c, k) to logits (c, V), for both unless there is a `base_head`.
        chunk_size: the most rows given to `head` at once, in forward and in backward's recomputation.
        base_head: the base model's own, where the head learns.

    Returns:
        The divergence of each token in nats, shape (n,), in float32, or float64 for float64 logits.

    Raises:
        ValueError: if the two differ in their number of rows, or `chunk_size` is below 1.
    """

    of_base = base_head or head

    def from_base(rows: Tensor, base_rows: Tensor) -> Tensor:
        log_p = log_probabilities(head(rows))
        with torch.no_grad():
            log_base = log_probabilities(of_base(base_rows))
        return divergence(log_base, log_p)

    return map_row_chunks(from_base, chunk_size, hidden, base_hidden)


def _kl(batch: RetainBatch) -> Tensor:
    if batch.base_hidden is None:
        raise ValueError("`base_hidden` is None, but the divergence is from the base model. Pass its hidden states.")
    return kl_to_base_loss(batch.hidden, batch.base_hidden, batch.head, base_head=batch.base_head)


def activation_loss(activations: Tensor, base_activations: Tensor) -> Tensor:
    """
    Distance of a layer's activations from the base model's, RMU's retain term: mean over dimensions of (h - h_0)^2.

    Args:
        activations: what the layer gives for each token, (n, k).
        base_activations: the same of the base model, without a gradient, (n, k).

    Returns:
        The loss of each token, (n,).

    References:
        Li et al., "The WMDP Benchmark", arXiv:2403.03218.
    """
    return (activations - base_activations.detach()).float().square().mean(-1)


def _activations(batch: RetainBatch) -> Tensor:
    if batch.activations is None or batch.base_activations is None:
        raise ValueError("`activations` or `base_activations` is None, but the loss is of them. Pass both.")
    return activation_loss(batch.activations, batch.base_activations)


@dataclass(frozen=True)
class RetainLoss:
    """
    An entry of `RETAIN_LOSSES`; the term is a mean over the labelled tokens of the step's retain rows.

    Attributes:
        compute: the loss of each token, (n,).
        caption: what it does, in a sentence.
        source: paper or code.
        needs_base: whether the base model has to look at the rows as well.
        needs_activations: whether it is of what a layer gives (`activation_depth`).
    """

    compute: Callable[[RetainBatch], Tensor]
    caption: str
    source: str
    needs_base: bool = False
    needs_activations: bool = False


RETAIN_LOSSES: dict[str, RetainLoss] = {
    "cross_entropy": RetainLoss(
        compute=lambda batch: cross_entropy_loss(batch.scores),
        caption="Cross-entropy on the retain rows.",
        source="L_retain of Eq. 8, arXiv 2603.01792",
    ),
    "kl": RetainLoss(
        compute=_kl,
        caption="Divergence of the adapted model from the base model on the retain rows.",
        source="KL minimisation, TOFU, arXiv 2401.06121",
        needs_base=True,
    ),
    "activations": RetainLoss(
        compute=_activations,
        caption="Distance of a layer's activations from the base model's on the retain rows.",
        source="RMU, WMDP, arXiv 2403.03218",
        needs_base=True,
        needs_activations=True,
    ),
}
