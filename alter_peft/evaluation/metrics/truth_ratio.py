# SPDX-License-Identifier: Apache-2.0
"""How true and false answers compare: TOFU's truth ratio and forget quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from .metric import Metric, require_rows


def truth_ratio(true: Sequence[float], false: Sequence[Sequence[float]]) -> list[float]:
    """
    How much likelier the false answers are than the true one: their geometric mean probability over its own.

    exp(mean_i l_i - l), with l the mean log-probability of a token of the true answer and l_i of the i-th false one.
    So TOFU's code has it for forget quality, and open-unlearning for all; TOFU's paper prints the arithmetic mean of
    the false answers' probabilities, which its code takes for utility. Exponents are kept within +-700, where float64
    ends: a destroyed model has ratios beyond.

    Args:
        true: l of the (rephrased) true answer, one a question, in nats.
        false: those of its false answers.

    References:
        Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121. Open-unlearning divides by
        p + 1e-10 instead of p, which matters only where p is about as small.
    """
    logs = [np.mean(wrong) - right for right, wrong in zip(true, false, strict=True)]
    return [float(np.exp(np.clip(log, -700, 700))) for log in logs]


def truth_share(true: Sequence[float], false: Sequence[Sequence[float]]) -> list[float]:
    """
    p / (p + p'), the probability of the true answer over its sum with the false ones' geometric mean: 1 / (1 + R).

    What open-unlearning's paper calls truth ratio, "extent of knowledge": .5 where both are equally likely, 1 where
    the true one is known. Its repository has it since pull request 163 as the aggregator `prob_mean`.

    Args:
        true, false: as of `truth_ratio`.

    References:
        Dorna et al., "OpenUnlearning", arXiv 2506.12618; its code adds 1e-10 to the sum.
    """
    return [1 / (1 + ratio) for ratio in truth_ratio(true, false)]


class ForgetQuality(NamedTuple):
    """
    Two-sample Kolmogorov-Smirnov test of truth ratios.

    Under equal distributions `pvalue` is uniform on [0, 1] if the samples are independent. Those of two models are
    not, since both answer the same questions: then it is mostly near 1. With 40 ratios and a correlation of .9 between
    two models that differ by chance alone, half of the p-values are above .9, and none of 400 is under .05.
    """

    statistic: float
    pvalue: float


def forget_quality(ratios: Sequence[float], oracle_ratios: Sequence[float]) -> ForgetQuality:
    """
    Can the model's truth ratios on the forget set be told from those of an oracle that never saw it? (TOFU)

    A p-value under .05 says yes; one above says nothing: small sets and destroyed models reach it too, and a model
    that still differs from the oracle, because the samples are paired (see `ForgetQuality`). The pairs of oracles of
    different seeds are the null: read statistic and p-value beside theirs. Both are the same for 1 / R, which
    open-unlearning takes.

    Raises:
        ValueError: either is empty.
    """
    require_rows(ratios=ratios, oracle_ratios=oracle_ratios)
    result = ks_2samp(ratios, oracle_ratios)
    return ForgetQuality(float(result.statistic), float(result.pvalue))


TRUTH_RATIO = Metric(
    caption="how much likelier the false answers are than the true one, R: the mean of min(R, 1 / R) on a set to be "
    "forgotten, of max(0, 1 - R) on any other",
    rows=lambda asked: truth_ratio(asked.true_means, asked.false_means),
    needs=("wrong", "rephrased"),
    average="truthfulness",
    average_forget="near_one",
)
TRUTH_SHARE = Metric(
    caption="probability of the true answer over its sum with the false ones' geometric mean",
    rows=lambda asked: truth_share(asked.true_means, asked.false_means),
    needs=("wrong", "rephrased"),
    is_ingredient=True,
)
