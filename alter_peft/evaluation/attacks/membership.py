# SPDX-License-Identifier: Apache-2.0
"""Membership inference: whether likelihoods say what was trained on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.metrics.membership import above_holdout, loss, loss_per_byte, min_k
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.scores import Score

from .attack import Attack, Rows


def membership(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[Score]:
    """
    Can the forget set be told from text that was never seen, by how likely its answers are?

    About 0 says yes, it was trained on; the oracle's figure says no, whatever it is: the two sets may differ in other
    ways too. Above the oracle's the forget set stands out as well. The rows are those of `min_k_auc`: the share of the
    holdout that each forget row is above.
    """
    asked = [
        rows.asked(model, tokenizer, "membership", pairs, name)
        for name, pairs in (("forget", rows.forget), ("holdout", rows.holdout))
    ]
    found = [(one.scores, [pair.completion for pair in one.pairs]) for one in asked]
    statistics = {
        "min_k": [min_k(scores.log_probs, scores.content) for scores, _ in found],
        "loss": [loss(scores.log_probs, scores.content) for scores, _ in found],
        "loss_per_byte": [loss_per_byte(scores.log_probs, scores.content, texts) for scores, texts in found],
    }
    settings = asked[0].settings_of_score(of_answers=False)
    return [
        Score.averaged("forget", f"{name}_auc", above_holdout(*of_sets), attack="membership", settings=settings)
        for name, of_sets in statistics.items()
    ]


def _auc(statistic: str) -> Metric:
    return Metric(caption=f"AUC of {statistic}, forget set against holdout: 0 if all forget rows are likelier")


MEMBERSHIP = Attack(
    run=membership,
    caption="the forget set is told from text that was never seen by how likely its answers are",
    needs=("holdout",),
    metrics={
        "min_k_auc": _auc("min-k%"),
        "loss_auc": _auc("the loss"),
        "loss_per_byte_auc": _auc("the loss over the size of the compressed answer"),
    },
)
