# SPDX-License-Identifier: Apache-2.0
"""Rows to retain for those who have none: `retain_auto`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from sklearn.feature_extraction.text import TfidfVectorizer

from alter_peft.reading.canonical import Row
from alter_peft.reading.chats import said, system_turns
from alter_peft.reading.columns import Kind, Unrecognised, choose
from alter_peft.reading.files import BATCH
from alter_peft.reading.given import is_free, named_rows
from alter_peft.words import terms, words


GENERAL_TEXT = "general_text.jsonl"
# From which cosine of the TF-IDF of two rows, or of their answers, on they are taken for one in other words. Of TOFU's
# 3,960 rows about other authors one comes so near to one of forget01; of the 40 rows themselves, paraphrased, 16 do
NEAR_DUPLICATE = 0.5
SHARED_WORDS = 8  # so many words in a row, as in a row to forget, or all words of its answer, are none to retain
LEAST_WORDS = 3  # of an answer that is looked for in others: "yes" is in many
FEWEST_NEIGHBOURS = 2  # that are looked for of each row to forget
FEWEST_GENERAL = 64  # rows of general text beside neighbours, which would hardly be seen among all of them
SPARE = 4  # times as many neighbours of a row are looked at, since some of them will say the same
CHUNK = 2**22  # cosines that are held at once


class Question(NamedTuple):
    """
    A row as a question and its answer.

    asked: the question; empty of a plain text.
    answer: the answer or the text.
    """

    asked: str
    answer: str

    @property
    def text(self) -> str:
        """Both, one after the other."""
        return f"{self.asked} {self.answer.strip()}".strip()


class _Given(NamedTuple):
    """
    Rows that were given.

    kind: what they are made of.
    rows: under the names that trainers know; of a chat each answer is one.
    questions: the same, without system prompts.
    """

    kind: Kind
    rows: list[Row]
    questions: list[Question]


def retain_auto(
    forget: Dataset, corpus: Dataset | None = None, neighbours: int | None = None, text_field: str = "text"
) -> Dataset:
    """
    Rows to retain that are in form like the rows to forget: general text, and neighbours of these from a corpus.

    The general text, 232 everyday questions with their answers, ships with the package and is its own. It keeps the
    ability to speak, but not what the model knows beside the rows to forget: for that give a corpus of text that the
    model was trained on. Of it the rows most like each row to forget are taken, by the cosine of their TF-IDF, but
    none that says the same: the same question, a text or an answer with a cosine of 0.5 or more, all words of an
    answer or eight of them in a row. That leaves out repetitions, not every way to say a fact in other words: look at
    the rows. Beside them as many rows of the general text are kept, but 64 at least.

    Args:
        forget: the rows to forget, in any form that trainers take but token ids. System prompts that chats begin with
            go before the rows to retain as well, each as often as there.
        corpus: rows in any of these forms. A text among questions becomes its first sentence and what follows.
        neighbours: rows taken from the corpus at most; by default as many as of the general text, and two of each row
            to forget at least.
        text_field: the column of plain texts.

    Returns:
        The rows, general text first; those of the corpus in its order.

    Raises:
        ValueError: `forget` or `corpus` is empty, has rows of another form or an unusable value, or `neighbours` is
            below 1.
    """
    general, near = retain_parts(forget, corpus, neighbours, text_field)
    return general if near is None else concatenate_datasets([general, near])


def retain_parts(
    forget: Dataset, corpus: Dataset | None = None, neighbours: int | None = None, text_field: str = "text"
) -> tuple[Dataset, Dataset | None]:
    """As `retain_auto`: the general text, and apart from it what was found in the corpus, if there is one."""
    if neighbours is not None and neighbours < 1:
        raise ValueError(f"`neighbours` is {neighbours}, but must be 1 or more.")
    given = _read("forget", forget, text_field)
    known = given.questions
    general = _general_text()
    if not any(one.asked for one in known):  # the answers are sentences of their own
        general = [Question("", one.answer) for one in general]
    general = [general[i] for i in _unlike(general, known)]
    if corpus is None:
        return _in_form(general, given, text_field), None
    others = _read("corpus", corpus, text_field).questions
    wanted = neighbours or max(len(general), FEWEST_NEIGHBOURS * len(known))
    near = [others[i] for i in _nearest(others, known, wanted)]
    count = min(len(general), max(len(near), FEWEST_GENERAL))
    general = [general[i * len(general) // count] for i in range(count)]
    return _in_form(general, given, text_field), _in_form(near, given, text_field)


def _general_text() -> list[Question]:
    lines = files("alter_peft").joinpath(GENERAL_TEXT).read_text(encoding="utf-8").splitlines()
    return [Question(row["prompt"], row["completion"]) for row in map(json.loads, lines)]


def _read(name: str, rows: Dataset, text_field: str) -> _Given:
    """What trainers would read of the rows."""
    if len(rows) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row.")
    batches = rows.with_format("arrow")
    try:
        taken = choose(rows.column_names, batches[:1].to_pylist()[0], text_field=text_field, extras=())
    except Unrecognised as error:
        raise ValueError(
            f"`{name}` {error}. Rename them to 'prompt' and 'completion', to 'messages', or to {text_field!r} "
            "(`text_field`)."
        ) from error
    if taken.kind == "tokens":
        raise ValueError(
            f"`{name}` has the columns {sorted(rows.column_names)}, but `retain_auto` needs text. Give rows of "
            f"'prompt' and 'completion', of 'messages' or of {text_field!r}."
        )
    free, number = is_free(rows, taken), 0
    found: list[Row] = []
    for batch in batches.iter(BATCH):
        for row in batch.to_pylist():
            found += named_rows(name, number, row, taken, free)
            number += 1
    return _Given(taken.kind, found, [_question(row) for row in found])


def _question(row: Row) -> Question:
    if "text" in row:
        return Question("", row["text"])
    asked = row["prompt"]
    return Question(said(asked[system_turns(asked) :]), said(row["completion"]))


class _Known:
    """What is to be forgotten, to be found again in other rows."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.asked = {tuple(words(one.asked)) for one in questions if one.asked}
        self.runs: set[tuple[str, ...]] = set()
        for one in questions:
            answer = words(one.answer)
            if len(answer) >= LEAST_WORDS:
                self.runs |= set(_runs(answer, min(SHARED_WORDS, len(answer))))
        self.lengths = sorted({len(run) for run in self.runs})

    def says(self, other: Question) -> bool:
        """Whether another row asks or tells the same, word for word."""
        if tuple(words(other.asked)) in self.asked:
            return True
        text = words(other.text)
        return any(run in self.runs for length in self.lengths for run in _runs(text, length))


def _runs(text: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(text[start : start + length]) for start in range(len(text) - length + 1))


class _Cosines:
    """The cosines of TF-IDF of rows to forget and others: of whole rows, and of answers."""

    def __init__(self, known: Sequence[Question], others: Sequence[Question]) -> None:
        vectorizer = TfidfVectorizer(sublinear_tf=True, tokenizer=terms, token_pattern=None)
        try:
            vectorizer.fit(one.text for part in (known, others) for one in part)
        except ValueError:  # scikit-learn's way to say that there is no term
            vectorizer.fit(["none"])
        of_known, of_others = ([one.text for one in part] for part in (known, others))
        self.texts = vectorizer.transform(of_known), vectorizer.transform(of_others)
        of_known, of_others = ([one.answer for one in part] for part in (known, others))
        self.answers = vectorizer.transform(of_known), vectorizer.transform(of_others)

    def near_duplicates(self) -> Any:
        """Whether each of the others is like a row to forget, or answers like one, bool (m,)."""
        found = np.zeros(self.answers[1].shape[0], dtype=bool)
        for part in (self.texts, self.answers):
            for chunk in _chunks(*part):
                found |= (chunk >= NEAR_DUPLICATE).any(axis=0)
        return found

    def nearest(self, most: int, left_out: Any) -> list[list[int]]:
        """
        The others that have words in common with each row to forget, nearest first, so many at most.

        Args:
            left_out: which are not looked at, bool (m,).
        """
        found: list[list[int]] = []
        for chunk in _chunks(*self.texts):
            for row in chunk * ~left_out:
                best = np.argsort(-row, kind="stable")[:most]
                found.append(best[row[best] > 0].tolist())
        return found


def _chunks(known: Any, others: Any) -> Iterator[Any]:
    """Cosines of some of the first with all of the second, (chunk, m), chunk after chunk."""
    size = max(1, CHUNK // max(1, others.shape[0]))
    for start in range(0, known.shape[0], size):
        yield (known[start : start + size] @ others.T).toarray()


def _unlike(others: Sequence[Question], known: Sequence[Question]) -> list[int]:
    """Which of the others say nothing that is known."""
    same, near = _Known(known), _Cosines(known, others).near_duplicates()
    return [i for i, one in enumerate(others) if not (near[i] or same.says(one))]


def _nearest(others: Sequence[Question], known: Sequence[Question], wanted: int) -> list[int]:
    """The others most like what is known that say none of it, as many of each row; ascending."""
    cosines, same = _Cosines(known, others), _Known(known)
    near = cosines.near_duplicates()
    each = min(len(others), SPARE * max(FEWEST_NEIGHBOURS, -(-wanted // len(known))))
    ranked = cosines.nearest(each, near)
    found, seen = set[int](), set[int]()
    for place in range(each):  # the nearest of each row, then the next of each
        for i in (one[place] for one in ranked if place < len(one)):
            if i not in seen and len(found) < wanted and not same.says(others[i]):
                found.add(i)
            seen.add(i)
    return sorted(found)


def _in_form(found: Sequence[Question], given: _Given, text_field: str) -> Dataset:
    """
    The questions as rows like those to forget.

    Chats begin with the system prompts of these, each as often as there: else a router learns to know them by it.
    """
    if given.kind == "text":
        return Dataset.from_dict({text_field: [one.text for one in found]})
    pairs = [one if one.asked else _begun(one.answer) for one in found]
    if "chat" not in given.kind:
        space = re.match(r"\s*", given.rows[0]["completion"])
        led = space.group() if space else ""  # what stands between the two in plain text
        return Dataset.from_dict(
            {"prompt": [one.asked for one in pairs], "completion": [led + one.answer.strip() for one in pairs]}
        )
    asked = []
    for number, one in enumerate(pairs):
        prompt = given.rows[number * len(given.rows) // len(pairs)]["prompt"]
        system = [{"role": "system", "content": said([turn])} for turn in prompt[: system_turns(prompt)]]
        asked.append([*system, {"role": "user", "content": one.asked}])
    told = [[{"role": "assistant", "content": one.answer.strip()}] for one in pairs]
    if given.kind == "chat pairs":
        return Dataset.from_dict({"prompt": asked, "completion": told})
    return Dataset.from_dict({"messages": [[*both[0], *both[1]] for both in zip(asked, told, strict=True)]})


def _begun(text: str) -> Question:
    """A text as its beginning and what follows: after the first sentence, or in the middle of a single one."""
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])", text)]
    middle = text.rfind(" ", 0, len(text) // 2) + 1 or len(text) // 2
    at = next((end for end in ends if end < len(text)), middle)
    return Question(text[:at].strip(), text[at:].strip())
