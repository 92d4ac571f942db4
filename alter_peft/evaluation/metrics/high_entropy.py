# SPDX-License-Identifier: Apache-2.0
"""How many tokens the base model is unsure of: the set D_high."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alter_peft.entropy import chunked_tsallis_entropy
from alter_peft.evaluation.answers import encode_pair, labelled_row
from alter_peft.evaluation.model_on_set import ModelOnSet
from alter_peft.scoring import Pass, ScoredModel

from .metric import Metric
from .needs import alter_config


def high_entropy(asked: ModelOnSet) -> dict[str, list[Tensor]]:
    """
    Which of the answers' tokens have an S_q above the adapter's threshold.

    S_q is the base model's, at the position that predicts the token. Where nearly no token is high, the structural
    term and the mask of the forget loss do nothing.
    """
    config = alter_config(asked.model)
    assert config is not None and config.entropy_threshold is not None
    encoded = [encode_pair(asked.tokenizer, pair) for pair in asked.pairs]
    entropies = base_entropies(asked.model, encoded, config.entropy_q, desc=f"{asked.name}, entropy", **asked.batches)
    return {"high_entropy": [row > config.entropy_threshold for row in entropies]}


def base_entropies(
    model: Any, encoded: Sequence[tuple[list[int], int]], q: float, batch_size: int = 8, desc: str | None = None
) -> list[Tensor]:
    """
    S_q of the base model at the positions that predict an answer's tokens, (n_i,) for each answer.

    Args:
        model: with an adapter of layers.
        encoded: as of `encode_pair`.
    """
    scored, rows = ScoredModel(model), [labelled_row(*one) for one in encoded]

    def entropy(batch: Pass) -> Tensor:
        return chunked_tsallis_entropy(batch.hidden, scored.head, q).float()

    return scored.of_rows(rows, batch_size, entropy, base=True, desc=desc)


HIGH_ENTROPY = Metric(
    caption="share of the answers' tokens whose entropy under the base model is above the adapter's threshold",
    tokens=high_entropy,
    needs=("threshold",),
    is_guard=True,
)
