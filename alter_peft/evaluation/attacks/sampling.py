# SPDX-License-Identifier: Apache-2.0
"""Sampling: what an attacker finds who asks many times."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import generate_answers
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.metrics.text import rouge_l
from alter_peft.evaluation.scores import Score

from .attack import Attack, Rows


def sampling(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    samples: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Score]:
    """
    Many answers to each question, drawn from the whole distribution: ROUGE-L recall of the best one and their mean.

    The best of n is leak@n of Reisizadeh et al. with ROUGE-L as the measure. PyTorch's generators are left as they
    were.

    Args:
        samples: answers to a question; so many are drawn at once at least, whatever the rows' `batch_size`.
        seed: of the draws.

    References:
        Reisizadeh et al., "Leak@k: Unlearning Does Not Make LLMs Forget Under Probabilistic Decoding",
        arXiv 2511.04934.
    """
    asked = rows.asked(model, tokenizer, "sampling", rows.forget, samples=samples, temperature=temperature)
    options = {"num_return_sequences": samples, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = generate_answers(
            model, tokenizer, asked.answered_pairs, max(1, (rows.batch_size or 64) // samples), rows.max_new_tokens,
            "sampling", do_sample=True, **options,
        )  # fmt: skip
    every = rouge_l(answers, [truth for truth in asked.true_texts for _ in range(samples)])
    found = [every[start : start + samples] for start in range(0, len(every), samples)]
    settings = asked.settings_of_score(of_answers=True)
    return [
        Score.averaged("forget", metric, [of_rows(row) for row in found], attack="sampling", settings=settings)
        for metric, of_rows in (("best_rouge", max), ("mean_rouge", lambda row: sum(row) / samples))
    ]


SAMPLING = Attack(
    run=sampling,
    caption="16 answers to each question at temperature 1",
    packages=("rouge_score",),
    metrics={
        "best_rouge": Metric(caption="ROUGE-L recall of the best sampled answer"),
        "mean_rouge": Metric(caption="ROUGE-L recall of a sampled answer"),
    },
)
