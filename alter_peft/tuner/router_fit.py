# SPDX-License-Identifier: Apache-2.0
"""How a router is fitted: each position's expert by logistic regression, or a perceptron, on the router's features."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from .router import Router, logits_of


# Positions that the router is fitted on at most, half of them of retain rows and as many of each sub-domain
MAX_ROUTER_POSITIONS = 80_000
# Positions on which the router that an adapter brings is compared with the one fitted on the data
PROBE_POSITIONS = 512
# Text that is to go to the retain expert, by what stands for its expert -> its share of retain's weight: retain rows,
# rows about other subjects than those to forget, general text
RETAIN, COUNTERFACTUAL, GENERAL = 0, -1, -2
SHARES = {RETAIN: 0.4, COUNTERFACTUAL: 0.4, GENERAL: 0.2}
# Of the perceptron: positions a step, passes over them, and where they are few how many steps at least
BATCH = 512
PASSES, LEAST_STEPS = 15, 1000  # four times the passes fit no better and leave less to questions asked otherwise


def sample_positions(experts: np.ndarray, seed: int, limit: int = MAX_ROUTER_POSITIONS) -> np.ndarray:
    """
    Ascending indices of the positions that the router is fitted on: all of them, or where they are too many a uniform
    sample of each expert's, so that a small sub-domain beside a large retain set loses none.

    Args:
        experts: the expert of each position, 0 for retain, or a key of `SHARES`, (total tokens,).
        seed: of the sample.
        limit: positions at most, half of them for retain.
    """
    generator = np.random.default_rng(seed)
    forget = max(1, len(np.unique(experts[experts > 0])))
    shares = _shares_of_retain(experts)
    picked = []
    for expert in np.unique(experts):
        share = int(limit // 2 * shares[expert]) if expert <= 0 else limit // 2 // forget
        picked.append(generator.permutation(np.flatnonzero(experts == expert))[:share])
    return np.sort(np.concatenate(picked))


def _shares_of_retain(experts: np.ndarray) -> dict[int, float]:
    """What each kind of text that is to go to the retain expert has of its weight, of those that are there."""
    present = {kind: share for kind, share in SHARES.items() if (experts == kind).any()}
    return {kind: share / sum(present.values()) for kind, share in present.items()}


def class_weights(experts: np.ndarray) -> dict[int, float]:
    """
    Weight of each position by its expert: half of the total for retain, if any is of it, divided by `SHARES` among the
    kinds of text that are, and the rest shared by the sub-domains.

    Args:
        experts: the expert of each position, 0 for retain, or a key of `SHARES`, (n,); at least one of a sub-domain.
    """
    present, counts = np.unique(experts, return_counts=True)
    of_retain = 0.5 if present[0] <= 0 else 0.0
    forget = np.count_nonzero(present > 0)
    kinds = _shares_of_retain(experts)
    shares = (of_retain * kinds[kind] if kind <= 0 else (1 - of_retain) / forget for kind in present.tolist())
    return {
        int(expert): share * len(experts) / count for expert, share, count in zip(present, shares, counts, strict=True)
    }


def fit_router(
    router: Router,
    averages: Tensor,
    entropy: Tensor,
    experts: np.ndarray,
    num_outputs: int,
    threshold: float,
    hidden_size: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """
    The weights of a router, from the positions that were sampled.

    With a router that can do without S, every position counts twice, once with its S and once without (as one at the
    threshold); but where there is text about other subjects, whose S is not measured, S has no say. Retained text has
    half of the weight and the sub-domains share the other half: with equal weights for all experts, many sub-domains
    would draw retained text to themselves (`docs/log.md`). Where the retain expert does not compete, positions that
    are to go to it are left out.

    Args:
        averages: c_t of the positions, (n, k).
        entropy: S_q there, (n,).
        experts: 0 for a position in a retain row, d for one in sub-domain d, or a key of `SHARES`, (n,).
        num_outputs: 1 + N, or N if the retain expert does not compete.
        threshold: of the entropy.
        hidden_size: units of the hidden layer, 0 for none.
        seed: of the hidden layer's beginning, and of the order of its steps.

    Returns:
        What `logits_of` takes, and `probe`: features of some of the positions, by which another router is compared
        with this one.
    """
    if not router.retain_competes:
        of_forget = experts > 0
        averages, entropy = (values[torch.as_tensor(of_forget)] for values in (averages, entropy))
        experts = experts[of_forget]
    with_entropy = "none" not in router.entropy_sources or (hidden_size == 0 and bool((experts >= 0).all()))
    features = [router.features(averages, entropy, threshold)] if with_entropy else []
    if "none" in router.entropy_sources:
        features.append(router.features(averages, None, threshold))
    inputs, kinds = torch.cat(features).numpy(), np.tile(experts, len(features))
    probe = np.linspace(0, len(experts) - 1, min(len(experts), PROBE_POSITIONS)).astype(int)
    found = {"weight": torch.zeros(num_outputs, hidden_size or inputs.shape[1]), "probe": features[-1][probe]}
    of_position = class_weights(kinds)
    fitted = _fit(inputs, kinds.clip(min=0), np.vectorize(of_position.get)(kinds), router.has_bias, hidden_size, seed)
    outputs = fitted.classes - int(not router.retain_competes)
    found["weight"][outputs] = torch.as_tensor(fitted.weight, dtype=torch.float32)
    if router.has_bias:
        found["bias"] = torch.full((num_outputs,), -1e4)  # an expert without rows is never chosen
        found["bias"][outputs] = torch.as_tensor(fitted.bias, dtype=torch.float32)
    if hidden_size:
        found["hidden_weight"] = torch.as_tensor(fitted.hidden_weight, dtype=torch.float32).contiguous()
        found["hidden_bias"] = torch.as_tensor(fitted.hidden_bias, dtype=torch.float32)
    return found


class _Fitted(NamedTuple):
    """
    classes: the experts that are there, ascending, C of them.
    weight, bias: (C, features or units), (C,).
    hidden_weight, hidden_bias: (units, features), (units,); empty without a hidden layer.
    """

    classes: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    hidden_weight: np.ndarray
    hidden_bias: np.ndarray


def _fit(
    inputs: np.ndarray, experts: np.ndarray, weights: np.ndarray, has_bias: bool, hidden_size: int, seed: int
) -> _Fitted:
    """The map of inputs (n, features) to experts (n,), each position of its weight (n,)."""
    classes = np.unique(experts)
    features, nothing = inputs.shape[1], np.zeros(0)
    with threadpool_limits(1, user_api="blas"):  # more are no faster on such narrow matrices, and end elsewhere
        if len(classes) == 1:  # nothing to choose between
            hidden = np.zeros((hidden_size, features)), np.zeros(hidden_size)
            return _Fitted(classes, np.zeros((1, hidden_size or features)), np.zeros(1), *hidden)
        if not hidden_size:
            regression = LogisticRegression(C=100.0, fit_intercept=has_bias, max_iter=1000)
            regression.fit(inputs, experts, weights)
            return _Fitted(classes, *_of_two(regression.coef_, regression.intercept_), nothing, nothing)
        # the features share one scale: those of unit vectors would make steps too small, and one each too many alike
        mean, scale = inputs.mean(axis=0), inputs.std() or 1.0
        batch = min(BATCH, len(inputs))
        passes = max(PASSES, LEAST_STEPS * batch // len(inputs))
        perceptron = MLPClassifier(hidden_size, batch_size=batch, max_iter=passes, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # so many passes are enough
            perceptron.fit((inputs - mean) / scale, experts, sample_weight=weights)
    (first, last), (first_bias, last_bias) = perceptron.coefs_, perceptron.intercepts_
    first[inputs.std(axis=0) == 0] = 0  # as it began: a feature that is always the same has no say
    hidden_weight = first.T / scale
    return _Fitted(classes, *_of_two(last.T, last_bias), hidden_weight, first_bias - hidden_weight @ mean)


def _of_two(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row for each class: scikit-learn keeps one for two."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])


def shares_astray(
    fitted: dict[str, Tensor], features: Tensor, experts: np.ndarray, counted: np.ndarray
) -> tuple[float, float]:
    """
    Share of the positions of forget rows that go to the retain expert, and of those of retain rows that go to others.

    Args:
        fitted: weights of a router in which the retain expert competes, as `logits_of` takes them.
        features: of the positions, (n, features).
        experts: 0 for a position in a retain row, d for one in sub-domain d, (n,).
        counted: which positions count, bool (n,).
    """
    sent = logits_of(features, fitted).argmax(dim=-1).numpy()
    is_forget = experts > 0
    wrong = (sent > 0) != is_forget
    of_forget, of_retain = (wrong[kind & counted] for kind in (is_forget, ~is_forget))
    return (float(of_forget.mean()) if of_forget.size else 0.0, float(of_retain.mean()) if of_retain.size else 0.0)
