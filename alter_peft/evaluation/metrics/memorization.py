# SPDX-License-Identifier: Apache-2.0
"""How much of an answer a model says by itself, given the true tokens before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from alter_peft.evaluation.answers import own_text

from .metric import Metric


def exact_memorization(greedy: Sequence[Tensor], content: Sequence[int]) -> list[float]:
    """
    Share of an answer's tokens that the model says by itself, given those before: EM.

    Args:
        greedy, content: as in [`AnswerScores`].

    Raises:
        ValueError: an answer without text of its own; so do all that take `content`.

    References:
        Tirumala et al., "Memorization Without Overfitting", arXiv 2205.10770.
    """
    return [float(row.float().mean()) for row in own_text(greedy, content)]


def extraction_strength(greedy: Sequence[Tensor], content: Sequence[int]) -> list[float]:
    """
    Share of an answer that the model completes by itself once it is given the rest: ES.

    1 - k / n, with k the fewest of its n tokens that must be given before greedy decoding says all others. An answer
    whose last token is wrong has 0; open-unlearning's code gives it 1 / n.

    Args:
        greedy, content: as for `exact_memorization`. Given the true tokens before each, all from the k-th on are right
            exactly where greedy decoding from there would say them.

    References:
        Carlini et al., "Extracting Training Data from Large Language Models", arXiv 2012.07805; for unlearning Wang et
        al., "Towards Effective Evaluations and Comparisons for LLM Unlearning Methods", arXiv 2406.09179.
    """
    strengths = []
    for row in own_text(greedy, content):
        wrong = (~row).nonzero().flatten()
        given = int(wrong[-1]) + 1 if len(wrong) else 0
        strengths.append(1 - given / len(row))
    return strengths


def floored_extraction_strength(greedy: Sequence[Tensor], content: Sequence[int]) -> list[float]:
    """`extraction_strength` as open-unlearning's code has it: 1 / n, not 0, where the last of n tokens is wrong."""
    strengths = zip(extraction_strength(greedy, content), content, strict=True)
    return [max(strength, 1 / n) for strength, n in strengths]


EXACT_MEMORIZATION = Metric(
    caption="share of the answer's tokens that are the model's first choice",
    rows=lambda asked: exact_memorization(asked.scores.greedy, asked.scores.content),
)
EXTRACTION_STRENGTH = Metric(
    caption="share of the answer that the model completes by itself once it is given the rest",
    rows=lambda asked: extraction_strength(asked.scores.greedy, asked.scores.content),
)
FLOORED_EXTRACTION_STRENGTH = Metric(
    caption="extraction strength as open-unlearning's code has it: 1 / n where the last of n tokens is wrong",
    rows=lambda asked: floored_extraction_strength(asked.scores.greedy, asked.scores.content),
    is_ingredient=True,
)
