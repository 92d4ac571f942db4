# SPDX-License-Identifier: Apache-2.0
"""The third term of Eq. 8: the model's uncertainty does not depend on the shared matrices A."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StructuralInvariance(NamedTuple):
    """The structural term and its gradient.

    Attributes:
        value: ||grad f||^2 over all shared tensors jointly, a scalar.
        gradients: the gradient of `value` in each shared tensor, to be added to its `.grad` with the term's weight.
    """

    value: Tensor
    gradients: list[Tensor]


def exact_structural_invariance(
    signed_entropy: Callable[[], Tensor], shared: Sequence[Tensor]
) -> StructuralInvariance:
    """Structural invariance as [`structural_invariance`] has it, with its exact gradient, by double backward.

    Everything between `shared` and f needs a second derivative. It costs one forward pass and about three backward
    ones, and holds what they save; under bfloat16 autocast the relative error of the gradient was 3e-2 on a random
    ten-layer transformer (`examples/studies/structural_term.py`).

    Args:
        signed_entropy: computes f, a scalar, from `shared`. Called once.
        shared: A of every adapted layer, tensors that require gradients; those that f does not use get zeros.

    Returns:
        The value and its gradients. Nothing is accumulated into `.grad`.

    Raises:
        ValueError: if `shared` is empty.
        RuntimeError: of torch's, where something has no second derivative.
    """
    _check_any(shared)
    first = torch.autograd.grad(signed_entropy(), shared, create_graph=True, allow_unused=True, materialize_grads=True)
    value = torch.stack([gradient.square().sum() for gradient in first]).sum()
    if not value.requires_grad:  # f is linear in all of them
        return StructuralInvariance(value, [torch.zeros_like(tensor) for tensor in shared])
    gradients = torch.autograd.grad(value, shared, allow_unused=True, materialize_grads=True)
    return StructuralInvariance(value.detach(), list(gradients))


def structural_invariance(
    signed_entropy: Callable[[], Tensor], shared: Sequence[Tensor], step: float = 1e-3
) -> StructuralInvariance:
    """Structural invariance, L_struct of Eq. 8, with its gradient, from first derivatives alone.

    For f(A) = sum_t eps_t S_q(x_t) over the high-entropy tokens, with independent signs eps_t = +-1 of mean 0, the
    value g.g with g = grad f(A) has expectation sum_t ||grad_A S_q(x_t)||^2: the cross terms cancel. Its gradient is
    2 H g, with H the Hessian of f, taken as a central difference along u = g / ||g||:

        2 H g = 2 ||g|| (grad f(A + h u) - grad f(A - h u)) / (2 h) + O(h^2),  h = step max(1, ||A||).

    Norms run over all shared tensors jointly, so `step` is the length of the displacement relative to that of A. The
    computation must resolve it: on a random six-layer transformer the default's relative error was 1e-4 in float32,
    where it is the best, but 1.4 under bfloat16 autocast, where rounding swallows it and 3e-2 was the best (0.07).

    Args:
        signed_entropy: recomputes f, a scalar, at the present values of `shared`: same data, same signs, no dropout.
            Called three times, or once where g = 0.
        shared: A of every adapted layer, leaf tensors that require gradients; those that f does not use get zeros.
            Displaced meanwhile, and restored bit for bit on return and on an error.
        step: relative length of the displacement, above 0.

    Returns:
        The value and its gradients. Nothing is accumulated into `.grad`, and no hook of DDP fires: over several
        processes the caller averages.

    Raises:
        ValueError: if `step` is not above 0, or `shared` is empty.
    """
    if not step > 0:
        raise ValueError(f"step is {step}; it must be above 0.")
    _check_any(shared)
    gradient = _first_derivative(signed_entropy, shared)
    norm = _joint_norm(gradient)
    value = torch.tensor(norm**2, dtype=torch.promote_types(shared[0].dtype, torch.float32), device=shared[0].device)
    if norm == 0:
        return StructuralInvariance(value, gradient)
    length = step * max(1.0, _joint_norm(shared))
    displacement = [tensor * (length / norm) for tensor in gradient]
    ahead, behind = _derivatives_beside(signed_entropy, shared, displacement)
    return StructuralInvariance(value, [(a - b) * (norm / length) for a, b in zip(ahead, behind, strict=True)])


def _check_any(shared: Sequence[Tensor]) -> None:
    if not shared:
        raise ValueError("shared is empty; give at least one tensor.")


def _first_derivative(function: Callable[[], Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(), shared, allow_unused=True, materialize_grads=True))


def _derivatives_beside(
    function: Callable[[], Tensor], shared: Sequence[Tensor], displacement: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives of `function` at `shared` plus and minus `displacement`; `shared` is restored."""
    # Through .data, which bumps no version: a graph of the main loss that holds A stays valid.
    origin = [tensor.detach().clone() for tensor in shared]
    try:
        derivatives = []
        for sign in (1, -1):
            for tensor, start, offset in zip(shared, origin, displacement, strict=True):
                tensor.data.copy_(start + sign * offset)
            derivatives.append(_first_derivative(function, shared))
    finally:
        for tensor, start in zip(shared, origin, strict=True):
            tensor.data.copy_(start)
    return derivatives[0], derivatives[1]


def _joint_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries of all tensors, in float32 at least."""
    norms = (torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    return math.hypot(*(norm.item() for norm in norms))
