# SPDX-License-Identifier: Apache-2.0
"""The copyright benchmark: what a model recites of a book and knows of it, after MUSE and the Harry Potter tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import Pair, chat_or_plain, generate_answers, score_answers
from .book_data import BookData
from .guards import measure_guards
from .measure import Asked, Score
from .metrics import bleu, exact_memorization, min_k, rouge_l
from .oracle import SIMILARITIES, min_k_auc, privacy_leak, similarity_gap


# MUSE's code: swj0419/muse_bench, eval.py and metrics/
VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
KNOWMEM_ENDS = ("\n\n", "\nQuestion", "Question:")
AUC = "forget/membership_auc"


def evaluate_books(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: BookData,
    answered: int | None = None,
    batch_size: int = 8,
    judge: Any = None,
    guards: bool = False,
) -> dict[str, Score]:
    """
    What a model recites of the books and knows of them, greedily and as plain text, whatever template there is.

    Of the sets `forget` and `retain`: `verbmem`, ROUGE-L F-measure of the first 128 tokens of a passage's
    continuation (MUSE); `rouge`, the same of all of it; `bleu` of all of it; and where there are questions `knowmem`,
    ROUGE-L F-measure of short answers (MUSE's code; words are not stemmed). Of these and `holdout`: `min_k` and
    `exact_memorization` of whole passages but for their first word. And `forget/membership_auc` (see `min_k_auc`).

    Args:
        answered: how many passages, spread over each set, are continued; all by default.
        judge, guards: whether guards are measured of the continued passages, too, and by what judge (see
            `measure_guards`).

    References:
        Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", arXiv 2407.06460.
    """
    plain = chat_or_plain(tokenizer, as_chat=False)
    scores: dict[str, Score] = {}

    def add(key: str, rows: list[float]) -> None:
        scores[key] = Score(mean(rows), rows)

    for name, passages in (("forget", data.forget), ("retain", data.retain)):
        asked = Asked(model, plain, name, passages, name == "forget", answered, data.length, batch_size)
        said, truth = asked.texts, [passage.completion for passage in asked.asked]
        said_first, truth_first = ([_first(plain, text) for text in texts] for texts in (said, truth))
        add(f"{name}/verbmem", rouge_l(said_first, truth_first, "fmeasure", use_stemmer=False))
        add(f"{name}/rouge", rouge_l(said, truth, "fmeasure", use_stemmer=False))
        add(f"{name}/bleu", bleu(said, truth))
        if guards:
            scores |= measure_guards([asked], judge)
    for name, questions in (("forget", data.forget_questions), ("retain", data.retain_questions)):
        if questions:
            said = generate_answers(model, plain, questions, batch_size, KNOWMEM_TOKENS, desc=f"{name}, answers")
            truth = [question.completion for question in questions]
            add(f"{name}/knowmem", rouge_l([_until_next(text) for text in said], truth, "fmeasure", use_stemmer=False))
    for name, passages in (("forget", data.forget), ("retain", data.retain), ("holdout", data.holdout)):
        found = score_answers(model, plain, [_whole(passage) for passage in passages], batch_size, desc=name)
        add(f"{name}/min_k", min_k(found.log_probs, found.content))
        add(f"{name}/exact_memorization", exact_memorization(found.greedy, found.content))
    return scores | {AUC: min_k_auc(scores)}


def _first(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:VERBMEM_TOKENS]))


def _until_next(answer: str) -> str:
    """What stands before the model goes on to questions of its own."""
    for end in KNOWMEM_ENDS:
        answer = answer.split(end)[0]
    return answer


def _whole(passage: Pair) -> Pair:
    """All of the passage's text to be scored but for its first word, which nothing precedes."""
    text = passage.prompt + passage.completion
    first = re.match(r"\s*\S+", text)
    end = first.end() if first else 0
    return Pair(text[:end], text[end:])


def compare_books(scores: Mapping[str, Score], oracles: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """
    Beside models that never saw the forget book: `forget/similarity_gap` (see `similarity_gap`) and `forget/privleak`
    (see `privleak`), 0 for an oracle. The oracle's level is the mean over the oracles.

    Args:
        scores, oracles: of `evaluate_books`.

    Raises:
        ValueError: there is no oracle, or a score is missing.
    """
    if not oracles:
        raise ValueError("`oracles` is empty: give the scores of at least one model that never saw the forget book.")
    missing = [key for key in (*SIMILARITIES, AUC) if any(key not in found for found in (scores, *oracles))]
    if missing:
        raise ValueError(
            f"The score {missing[0]!r} is missing of the model or of an oracle. Run `evaluate_books` on both."
        )
    leak = privacy_leak(scores[AUC].value, [oracle[AUC].value for oracle in oracles])
    return {
        "forget/similarity_gap": Score(similarity_gap(scores, oracles), []), "forget/privleak": Score(leak, []),
    }  # fmt: skip
