# SPDX-License-Identifier: Apache-2.0
"""How a router is fitted: multinomial logistic regression of each position's expert on the router's features."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from .router import Router


# Positions that the router is fitted on at most, half of them of retain rows and as many of each sub-domain
MAX_ROUTER_POSITIONS = 80_000
# Positions on which the router that an adapter brings is compared with the one fitted on the data
PROBE_POSITIONS = 512


def sample_positions(experts: np.ndarray, seed: int, limit: int = MAX_ROUTER_POSITIONS) -> np.ndarray:
    """
    Ascending indices of the positions that the router is fitted on: all of them, or where they are too many a uniform
    sample of each expert's, so that a small sub-domain beside a large retain set loses none.

    Args:
        experts: the expert of each position, 0 for retain, (total tokens,).
        seed: of the sample.
        limit: positions at most, half of them for retain.
    """
    generator = np.random.default_rng(seed)
    forget = max(1, len(np.unique(experts[experts > 0])))
    picked = []
    for expert in np.unique(experts):
        share = limit // 2 if expert == 0 else limit // 2 // forget
        picked.append(generator.permutation(np.flatnonzero(experts == expert))[:share])
    return np.sort(np.concatenate(picked))


def class_weights(experts: np.ndarray) -> dict[int, float]:
    """
    Weight of each position by its expert: half of the total for retain, if any is of it, and the rest shared by the
    sub-domains.

    Args:
        experts: the expert of each position, 0 for retain, (n,); at least one of a sub-domain.
    """
    present, counts = np.unique(experts, return_counts=True)
    of_retain = 0.5 if present[0] == 0 else 0.0
    forget = np.count_nonzero(present)
    shares = (of_retain if expert == 0 else (1 - of_retain) / forget for expert in present)
    return {
        int(expert): share * len(experts) / count for expert, share, count in zip(present, shares, counts, strict=True)
    }


def fit_router(
    router: Router, averages: Tensor, entropy: Tensor, experts: np.ndarray, num_outputs: int, threshold: float
) -> dict[str, Tensor]:
    """
    W and b of a router, from the positions that were sampled.

    With a router that can do without S, every position counts twice, once with its S and once without (as one at the
    threshold). Retained text has half of the weight and the sub-domains share the other half: with equal weights for
    all experts, many sub-domains would draw retained text to themselves (`docs/log.md`). Where the retain expert does
    not compete, retained positions are left out.

    Args:
        averages: c_t of the positions, (n, k).
        entropy: S_q there, (n,).
        experts: 0 for a position in a retain row, d for one in sub-domain d, (n,).
        num_outputs: 1 + N, or N if the retain expert does not compete.
        threshold: of the entropy.

    Returns:
        `weight`, (outputs, features), `bias`, (outputs,), if the router has one, and `probe`: features of some of the
        positions, by which another router is compared with this one.
    """
    if not router.retain_competes:
        of_forget = experts > 0
        averages, entropy = (values[torch.as_tensor(of_forget)] for values in (averages, entropy))
        experts = experts[of_forget]
    features = [router.features(averages, entropy, threshold)]
    if "none" in router.entropy_sources:
        features.append(router.features(averages, None, threshold))
    inputs, targets = torch.cat(features).numpy(), np.tile(experts, len(features))
    classes, coefficients, intercepts = _regression(inputs, targets, router.has_bias)
    probe = np.linspace(0, len(experts) - 1, min(len(experts), PROBE_POSITIONS)).astype(int)
    found = {"weight": torch.zeros(num_outputs, inputs.shape[1]), "probe": features[-1][probe]}
    outputs = classes - int(not router.retain_competes)
    found["weight"][outputs] = torch.as_tensor(coefficients, dtype=torch.float32)
    if router.has_bias:
        found["bias"] = torch.full((num_outputs,), -1e4)  # an expert without rows is never chosen
        found["bias"][outputs] = torch.as_tensor(intercepts, dtype=torch.float32)
    return found


def _regression(inputs: np.ndarray, experts: np.ndarray, has_bias: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The experts that are there, ascending, their coefficients, and their intercepts."""
    classes = np.unique(experts)
    if len(classes) == 1:  # nothing to choose between
        return classes, np.zeros((1, inputs.shape[1])), np.zeros(1)
    regression = LogisticRegression(
        C=100.0, class_weight=class_weights(experts), fit_intercept=has_bias, max_iter=1000
    )
    with threadpool_limits(1, user_api="blas"):  # more are no faster on such narrow matrices, and end elsewhere
        regression.fit(inputs, experts)
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(classes) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        intercepts = np.concatenate([np.zeros_like(intercepts), intercepts])
    return classes, coefficients, intercepts


def shares_astray(
    fitted: dict[str, Tensor], features: Tensor, experts: np.ndarray, counted: np.ndarray
) -> tuple[float, float]:
    """
    Share of the positions of forget rows that go to the retain expert, and of those of retain rows that go to others.

    Args:
        fitted: `weight` and perhaps `bias` of a router in which the retain expert competes.
        features: of the positions, (n, features).
        experts: 0 for a position in a retain row, d for one in sub-domain d, (n,).
        counted: which positions count, bool (n,).
    """
    sent = torch.nn.functional.linear(features, fitted["weight"], fitted.get("bias")).argmax(dim=-1).numpy()
    is_forget = experts > 0
    wrong = (sent > 0) != is_forget
    of_forget, of_retain = (wrong[kind & counted] for kind in (is_forget, ~is_forget))
    return (float(of_forget.mean()) if of_forget.size else 0.0, float(of_retain.mean()) if of_retain.size else 0.0)
