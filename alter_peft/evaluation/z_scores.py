# SPDX-License-Identifier: Apache-2.0
"""How far each token of an answer is from what the model expects of a token there, in standard deviations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alter_peft.entropy import log_probabilities, map_row_chunks
from alter_peft.scoring import Pass, ScoredModel

from .answers import Pair, encode_texts, labelled_row


LEAST_VARIANCE = 1e-6  # as in open-unlearning: a model that is sure of a token has none
LEAST_LOG = -1e9  # in place of -inf, of a token of probability 0, which adds nothing


def z_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """
    (ln p(label) - mu) / sigma, with mu and sigma of ln p(v) over tokens v that are drawn from p: float32 (n,).

    Args:
        logits: (n, V).
        labels: (n,).

    References:
        Zhang et al., "Min-K%++: Improved Baseline for Detecting Pre-Training Data from LLMs", arXiv 2404.02936.
    """
    log_probs = log_probabilities(logits).float()
    probs = log_probs.exp()
    finite = log_probs.clamp(min=LEAST_LOG)
    mean = (probs * finite).sum(dim=-1)
    variance = ((probs * finite.square()).sum(dim=-1) - mean.square()).clamp(min=LEAST_VARIANCE)
    return (log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - mean) / variance.sqrt()


def token_z_scores(
    model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], batch_size: int = 8, desc: str | None = None
) -> list[Tensor]:
    """
    `z_scores` of the tokens of each answer, end of turn included, (n_i,), from one pass; else as `score_answers`.

    Raises:
        ValueError: an answer has no token that is scored, or a pair is longer than the model's positions.
    """
    scored = ScoredModel(model)
    rows = [labelled_row(*one) for one in encode_texts(tokenizer, pairs, f"The set {desc!r}" if desc else "`pairs`")]

    def compute(batch: Pass) -> Tensor:
        return map_row_chunks(
            lambda rows, labels: z_scores(scored.head(rows), labels), 256, batch.hidden, batch.labels
        )

    return scored.of_rows(rows, batch_size, compute, desc=desc)
