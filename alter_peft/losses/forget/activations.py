# SPDX-License-Identifier: Apache-2.0
"""Losses of activations: what a layer makes of forget text, in place of what the head makes of it."""

from __future__ import annotations

from torch import Tensor


def steering_loss(activations: Tensor, direction: Tensor, coefficient: float = 6.5) -> Tensor:
    """
    Representation misdirection (RMU), the forget term: mean over dimensions of (h_t - c u)^2.

    Its other half, which keeps retain rows where the base model has them, is `retain_loss="activations"`.

    Args:
        activations: h, what a decoder layer gives for each token, (n, k).
        direction: u, of length 1, drawn once and positive in every dimension, (k,).
        coefficient: c; 6.5 is the paper's for Zephyr-7B, whose activations are of about that size. It has to be
            chosen for the model.

    Returns:
        The loss of each token, (n,).

    References:
        Li et al., "The WMDP Benchmark", arXiv:2403.03218: layer 7 of 32, weight 1200 of the retain term.
    """
    return (activations - coefficient * direction.to(activations.dtype)).float().square().mean(-1)
