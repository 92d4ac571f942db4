# SPDX-License-Identifier: Apache-2.0
"""Reading books, cut into passages, and questions on them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.metrics.metric import Metric

from .books import BookData
from .task import Task


def read_book(path: Path | str) -> str:
    """
    The text of a .txt or .txt.gz file in UTF-8: the lines of a paragraph are joined, an empty line parts paragraphs.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or it has no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no book at {str(path)!r}. Give the path of a .txt or .txt.gz file.")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"The book {str(path)!r} is no text in UTF-8 ({error}). Convert it.") from error
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    if not any(paragraphs):
        raise ValueError(f"The book {str(path)!r} has no text. Give another one.")
    return "\n\n".join(part for part in paragraphs if part)


def cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """
    Consecutive pieces of at most `length` tokens that end where a word ends; what is left over at the end is dropped.

    Joined, they are the text; white space stands before a word. So a piece has the same tokens alone and in the text.

    Raises:
        ValueError: the tokenizer tells no offsets, or a word has more than `length` tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer` is a {type(tokenizer).__name__}, but cutting needs a fast one, with offsets.")
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    ends = np.array([word.end() for word in re.finditer(r"\S+", text)])
    tokens = np.searchsorted(starts, ends)  # before the end of each word
    pieces, begin, used = [], 0, 0
    while len(starts) - used >= length:
        last = int(np.searchsorted(tokens, used + length, side="right")) - 1
        if last < 0 or ends[last] <= begin:
            raise ValueError(f"`length` is {length}, but a word after {text[begin : begin + 20]!r} has more tokens.")
        pieces.append(text[begin : ends[last]])
        begin, used = int(ends[last]), int(tokens[last])
    return pieces


def read_books(
    tokenizer: PreTrainedTokenizerBase,
    forget: Path | str,
    retain: Sequence[Path | str],
    holdout: Path | str | None = None,
    forget_questions: Path | str | None = None,
    retain_questions: Path | str | None = None,
    shots: Path | str | None = None,
    passages: int | None = None,
    length: int = 200,
) -> BookData:
    """
    Books cut into passages of 2 `length` tokens, and questions on them.

    Every third passage of the forget book is held out, unless another book is; half of these are for calibration. Not
    a later part of the book, which may be told in another voice: then forget and held-out text differ without any
    training (docs/benchmarks.md).

    Args:
        forget: the book to be forgotten, see `read_book`.
        retain: the books to be kept.
        holdout: a book of the same kind that no model is trained on, instead of every third passage of `forget`.
        forget_questions, retain_questions: files of JSON lines `{"question", "answer"}`, for KnowMem.
        shots: such a file, whose questions and answers stand before each question to show the form.
        passages: of each set, at most so many: the first of the book, and for `retain` the first of each in turn.
        length: tokens of a passage's beginning and of its continuation, which the model is to say; CoTaEval (Wei et
            al., "Evaluating Copyright Takedown Methods for Language Models", arXiv 2406.18664) takes 200 for both.

    Raises:
        ValueError: a file that is missing or has no such rows, a book in two places, or one too short for a passage.
    """
    files = [Path(path).resolve() for path in (forget, *retain, *([holdout] if holdout else []))]
    twice = sorted({path.name for path in files if files.count(path) > 1})
    if twice or not retain:
        fault = f"{twice} stand in two places" if twice else "`retain` is empty"
        raise ValueError(f"{fault}: give one book to forget, others to retain, and for `holdout` yet another or none.")

    def cut_book(path: Path | str) -> list[Pair]:
        pieces = cut(read_book(path), tokenizer, length)
        found = [Pair(*both) for both in zip(pieces[::2], pieces[1::2], strict=False)]
        if not found:
            raise ValueError(f"The book {str(path)!r} is shorter than a passage of {2 * length} tokens (2 `length`).")
        return found

    whole = cut_book(forget)
    seen = whole if holdout else [passage for number, passage in enumerate(whole) if number % 3 < 2]
    unseen = cut_book(holdout) if holdout else whole[2::3]
    if len(unseen) < 2:
        raise ValueError(
            f"There are {len(unseen)} hold-out passages, but calibration and membership inference need one each. Give "
            "a longer book, or a smaller `length`."
        )
    share = None if passages is None else -(-passages // len(retain))
    kept = [cut_book(path)[:share] for path in retain]
    examples = "".join(f"{pair.prompt}{pair.completion}\n\n" for pair in _ask(shots, ""))
    return BookData(
        name=Path(forget).name.split(".")[0],
        length=length,
        settings={"books": [path.name for path in files], "length": length, "passages": passages},
        forget=seen[:passages],
        retain=[passage for book in kept for passage in book][:passages],
        calibration=unseen[1::2][:passages],
        holdout=unseen[::2][:passages],
        forget_questions=_ask(forget_questions, examples),
        retain_questions=_ask(retain_questions, examples),
    )


def _read_questions(path: Path | str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise ValueError(f"There are no questions at {str(path)!r}. Give a file of JSON lines.")
    rows, text = [], Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text.rstrip("\n").split("\n") if text else [], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {str(path)!r} is no JSON ({error}).") from error
        missing = [key for key in ("question", "answer") if not isinstance(row, dict) or not row.get(key)]
        if missing:
            raise ValueError(f"Line {number} of {str(path)!r} has no {missing[0]!r}. Each line needs both.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{str(path)!r} has no questions. Give at least one.")
    return rows


def _ask(path: Path | str | None, examples: str) -> list[Pair]:
    rows = [] if path is None else _read_questions(path)
    return [Pair(f"{examples}Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]


BOOKS = Task(
    read=read_books,
    caption="copyright: one book is forgotten, others kept",
    packages=("rouge_score", "sacrebleu"),
    is_attacked=False,
    metrics={
        "membership_auc": Metric(caption="AUC of `min_k`, forget set against holdout: 0 if all of it is likelier"),
        "similarity_gap": Metric(caption="mean over ROUGE-L and BLEU of |model - oracle|"),
        "privleak": Metric(
            caption="(AUC - AUC of the oracle) / AUC of the oracle", range=(-100.0, inf), unit="percent"
        ),
    },
)
