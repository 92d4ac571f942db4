# SPDX-License-Identifier: Apache-2.0
"""What a model says in full, beside the true answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from alter_peft.evaluation.model_on_set import ModelOnSet
from alter_peft.words import spaced, words

from .metric import Metric


# MUSE's code: swj0419/muse_bench, eval.py and metrics/
VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
KNOWMEM_ENDS = re.compile("\n\n|\nQuestion|Question:")


class _Words:
    """What rouge-score calls for the words of a text; Porter stems are of English words of four letters or more."""

    def __init__(self, use_stemmer: bool) -> None:
        from nltk.stem.porter import PorterStemmer  # a dependency of rouge-score

        self.stem: Callable[[str], str] = PorterStemmer().stem if use_stemmer else str

    def tokenize(self, text: str) -> list[str]:
        return [self.stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]


def rouge_l(
    answers: Sequence[str], references: Sequence[str], kind: str = "recall", use_stemmer: bool = True
) -> list[float]:
    """
    ROUGE-L of each answer against its reference, by the package rouge-score.

    TOFU takes the recall of stemmed words. MUSE's code takes the F-measure of words as they stand, for VerbMem and
    for KnowMem; open-unlearning stems there too. Words are those of `alter_peft.words`, of any script; English ones
    are those of rouge-score. A reference without a word, such as a sign, is recited (1) or not (0).

    Args:
        kind: `"recall"`, `"precision"` or `"fmeasure"`.
        use_stemmer: whether words are compared by their Porter stems.

    Raises:
        ValueError: a `kind` that does not exist.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("precision", "recall", "fmeasure")
    if kind not in kinds:
        raise ValueError(f"`kind` is {kind!r}, but must be one of {list(kinds)}.")
    scorer, place = RougeScorer(["rougeL"], tokenizer=_Words(use_stemmer)), kinds.index(kind)
    return [
        float(scorer.score(reference, answer)["rougeL"][place] if words(reference) else answer == reference)
        for answer, reference in zip(answers, references, strict=True)
    ]


def bleu(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """
    BLEU-4 of each answer against its reference, in [0, 1], by the package sacrebleu with its defaults.

    The mean over answers is what the code of ECO (arXiv 2406.07933) and SOUL (arXiv 2404.18239) reports; it is not the
    BLEU of all of them as one corpus. In scripts without spaces each letter is a word.

    References:
        Post, "A Call for Clarity in Reporting BLEU Scores", arXiv 1804.08771.
    """
    import sacrebleu

    pairs = zip(answers, references, strict=True)
    return [
        float(sacrebleu.corpus_bleu([spaced(answer)], [[spaced(reference)]]).score) / 100
        for answer, reference in pairs
    ]


def unique_tokens(answers: Sequence[str]) -> list[float]:
    """Unique words, of any script, over words of each answer: near 0 for one that repeats itself; 0 if empty."""
    return [len(set(found)) / len(found) if (found := spaced(answer.lower()).split()) else 0.0 for answer in answers]


def rouge_f(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L as MUSE's code has it: the F-measure of words as they stand."""
    return rouge_l(answers, references, "fmeasure", use_stemmer=False)


def verbmem(asked: ModelOnSet) -> list[float]:
    """`rouge_f` of the first `VERBMEM_TOKENS` tokens of what the model says and of the truth (MUSE's VerbMem)."""
    tokenizer: Any = asked.tokenizer
    encoded = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (asked.texts, asked.true_texts))
    return rouge_f(*(tokenizer.batch_decode([ids[:VERBMEM_TOKENS] for ids in rows]) for rows in encoded))


def knowmem(asked: ModelOnSet) -> list[float]:
    """`rouge_f` of short answers, up to where the model goes on to questions of its own (MUSE's KnowMem)."""
    return rouge_f([KNOWMEM_ENDS.split(text)[0] for text in asked.texts], asked.true_texts)


OF_ANSWERS, ROUGE_SCORE = ("answers",), ("rouge_score",)
ROUGE = Metric(
    caption="ROUGE-L recall of the model's own answer against the true one, stemmed",
    rows=lambda asked: rouge_l(asked.texts, asked.true_texts), needs=OF_ANSWERS, packages=ROUGE_SCORE,
)  # fmt: skip
ROUGE_F = Metric(
    caption="ROUGE-L F-measure of what the model says, words as they stand",
    rows=lambda asked: rouge_f(asked.texts, asked.true_texts), needs=OF_ANSWERS, packages=ROUGE_SCORE,
)  # fmt: skip
BLEU = Metric(
    caption="BLEU-4 of each answer, a mean over answers",
    rows=lambda asked: bleu(asked.texts, asked.true_texts), needs=OF_ANSWERS, packages=("sacrebleu",),
)  # fmt: skip
VERBMEM = Metric(
    caption="ROUGE-L F-measure of the first 128 tokens of a passage's greedy continuation",
    rows=verbmem, needs=OF_ANSWERS, packages=ROUGE_SCORE,
)  # fmt: skip
KNOWMEM = Metric(caption="ROUGE-L F-measure of short answers", rows=knowmem, needs=OF_ANSWERS, packages=ROUGE_SCORE)
UNIQUE_TOKENS = Metric(
    caption="unique words over words of each answer: near 0 for a model that repeats itself",
    rows=lambda asked: unique_tokens(asked.texts), needs=OF_ANSWERS, is_guard=True,
)  # fmt: skip
