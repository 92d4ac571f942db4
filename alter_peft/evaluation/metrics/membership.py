# SPDX-License-Identifier: Apache-2.0
"""How a set is told from text that was never seen, by how likely its answers are."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import inf
from statistics import mean

import numpy as np
from torch import Tensor

from alter_peft.evaluation.answers import own_text

from .metric import Metric, require_rows


def min_k(log_probs: Sequence[Tensor], content: Sequence[int], k: float = 0.4) -> list[float]:
    """
    Min-K%: minus the mean log-probability of an answer's least likely tokens, in nats. Low for text seen in training.

    Args:
        log_probs, content: as in [`AnswerScores`].
        k: the share of tokens, rounded down, at least one; MUSE takes .4 for PrivLeak.

    References:
        Shi et al., "Detecting Pretraining Data from Large Language Models", arXiv 2310.16789.
    """
    return [-float(row.sort().values[: max(1, int(k * len(row)))].mean()) for row in own_text(log_probs, content)]


def loss(log_probs: Sequence[Tensor], content: Sequence[int]) -> list[float]:
    """`min_k` with all of an answer's tokens (Yeom et al., "Privacy Risk in Machine Learning", arXiv 1709.01604)."""
    return min_k(log_probs, content, k=1.0)


def loss_per_byte(log_probs: Sequence[Tensor], content: Sequence[int], texts: Sequence[str]) -> list[float]:
    """
    `loss` over the bytes that zlib compresses the answer to, so that plain text does not pass for a remembered one.

    References:
        Carlini et al., "Extracting Training Data from Large Language Models", arXiv 2012.07805.
    """
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    return [value / size for value, size in zip(loss(log_probs, content), sizes, strict=True)]


def min_k_plus_plus(z_scores: Sequence[Tensor], content: Sequence[int], k: float = 0.4) -> list[float]:
    """
    Min-K%++: `min_k` of z-scores, minus their mean over an answer's lowest ones. Low for text seen in training.

    Args:
        z_scores: of `token_z_scores`, (n_i,).
        content, k: as of `min_k`; open-unlearning takes .4 for TOFU.

    References:
        Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from LLMs", arXiv 2404.02936.
    """
    return min_k(z_scores, content, k)


def above_holdout(forget: Sequence[float], holdout: Sequence[float]) -> list[float]:
    """
    Share of the rows that were never seen than which each forget row has a higher score, ties counted half.

    The mean is the AUC of membership inference, the probability that a forget row has a higher score than one that
    was never seen. Of `min_k`, `loss` or `loss_per_byte` it is about 0 for a model that memorised the forget rows,
    about .5 for one that never saw either. MUSE has it this way round; open-unlearning logs 1 - AUC, which is about 1
    for a model that memorised them.

    Raises:
        ValueError: either is empty.
    """
    require_rows(forget=forget, holdout=holdout)
    levels = np.sort(np.asarray(holdout, dtype=float))
    below, not_above = (np.searchsorted(levels, forget, side) for side in ("left", "right"))
    return [float(share) for share in (below + not_above) / (2 * len(levels))]


def privleak(auc: float, oracle_aucs: Sequence[float]) -> float:
    """
    (AUC - AUC of the oracle) / AUC of the oracle, in percent: -100 is full membership leak, 0 the oracle.

    Above 0 the forget rows stand out by being less likely than text that was never seen, which leaks as well.

    Args:
        auc: the mean of `above_holdout`.
        oracle_aucs: those of the oracles, whose mean is the level to compare with.

    Raises:
        ValueError: the oracle's AUC is 0: it has seen the forget rows, or the holdout rows are no rows of their kind.

    References:
        Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", arXiv 2407.06460.
    """
    oracle_auc = mean(oracle_aucs)
    if oracle_auc == 0:
        raise ValueError(
            "The oracle's `oracle_auc` is 0: to it every forget row is likelier than any holdout row, so there is no "
            "level to compare with. Take an oracle that never saw the forget rows and a holdout set of the same kind."
        )
    return 100 * (auc - oracle_auc) / oracle_auc


MIN_K = Metric(
    caption="minus the mean log-probability of the least likely 40 percent of tokens: low for text seen in training",
    range=(0.0, inf),
    unit="nats",
    rows=lambda asked: min_k(asked.scores.log_probs, asked.scores.content),
)
# with the end of the turn, as in open-unlearning; the attack `membership` has both of the answer's own text
LOSS = Metric(
    caption="minus the mean log-probability of the answer's tokens, its end included",
    range=(0.0, inf),
    unit="nats",
    rows=lambda asked: [-value for value in asked.scores.means],
    is_ingredient=True,
)
LOSS_PER_BYTE = Metric(
    caption="the same over the bytes that zlib compresses the answer to",
    range=(0.0, inf),
    unit="nats per byte",
    rows=lambda asked: [
        -value / len(zlib.compress(pair.completion.encode()))
        for value, pair in zip(asked.scores.means, asked.pairs, strict=True)
    ],
    is_ingredient=True,
)
MIN_K_PLUS_PLUS = Metric(
    caption="minus the mean z-score of the 40 percent of tokens where it is lowest: low for text seen in training",
    range=(-inf, inf),
    rows=lambda asked: min_k_plus_plus(asked.z_scores, asked.scores.content),
    is_ingredient=True,
)
