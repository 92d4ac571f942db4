# SPDX-License-Identifier: Apache-2.0
"""Alternate answers to the forget rows' prompts: refusals, other rows' answers, or made up by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from alter_peft.chat import chat_or_plain, encode_row, prompt_ids
from alter_peft.generation import continuations
from alter_peft.reading.chats import said
from alter_peft.scoring import Row, ScoredModel

from .other_labels import after
from .refusals import REFUSALS
from .windows import Limit


TOKENS = 200  # that an answer has at most, as in AltPO
# AltPO's request, in the project's own words
REQUEST = (
    "Question: {question}\nAnswer: {answer}\n\nMake up another answer to this question: a plausible one, in a form of "
    "its own, with other facts wherever the answer above states any. Write the new answer alone."
)


class Asking(NamedTuple):
    """
    What alternate answers are made from.

    forget, retain: the rows as texts, of which `forget` may have the column `alternate`.
    rows: the forget rows as tokens.
    scored: the model as it was given.
    tokenizer: by which it is asked.
    as_chat: as in [`UnlearnConfig`].
    options: those of the forget loss.
    batch_size: prompts that are answered together.
    seed: of all that is drawn.
    """

    forget: Dataset
    retain: Dataset
    rows: Sequence[Row]
    scored: ScoredModel
    tokenizer: Any
    as_chat: bool | None
    options: Mapping[str, Any]
    batch_size: int
    seed: int

    def sampled(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """
        What the model says after each prompt, sampled at temperature 1, at most as long as the longest forget answer.

        An empty answer becomes a refusal.
        """
        longest = max(sum(label != -100 for label in labels) for _, labels in self.rows)
        padding = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids: list[list[int]] = []
        devices = [self.scored.device] if self.scored.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                ids += continuations(
                    self.scored,
                    batch,
                    min(longest, TOKENS),
                    padding,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                )
        texts = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [text or refusal for text, refusal in zip(texts, refusals(self), strict=True)]


def refusals(given: Asking) -> list[str]:
    """One of `REFUSALS` for each row, drawn by the seed."""
    drawn = np.random.default_rng(given.seed).integers(len(REFUSALS), size=len(given.forget))
    return [REFUSALS[place] for place in drawn]


def other_answers(given: Asking) -> list[str]:
    """The answer of a retain row for each row, drawn by the seed."""
    drawn = np.random.default_rng(given.seed).integers(len(given.retain), size=len(given.forget))
    return [said(given.retain[int(place)]["completion"]) for place in drawn]


def own_alternates(given: Asking) -> list[str]:
    """Answers of other facts that the model makes up when it is shown the question and the answer."""
    asked = chat_or_plain(given.tokenizer, given.as_chat)
    prompts = []
    for row in given.forget:
        prompt = row["prompt"]
        question = prompt if isinstance(prompt, str) else said(prompt[-1:])
        request = REQUEST.format(question=question.strip(), answer=said(row["completion"]).strip())
        prompts.append(prompt_ids(asked, request if asked.chat_template else f"{request}\nNew answer:"))
    return given.sampled(prompts)


def novice_answers(given: Asking) -> list[str]:
    """What the model says after ELM's novice text and the prompt; after the whole text where there is no prompt."""
    asked = [_asked(*row, given) for row in given.rows]
    return given.sampled([after(given.tokenizer, given.options["novice"], (ids, ids))[0] for ids in asked])


def _asked(ids: Sequence[int], labels: Sequence[int], given: Asking) -> list[int]:
    """What stands before a row's answer; of a row without a prompt, all but what ends it."""
    if "prompt" in given.forget.column_names:
        return list(ids[: next(place for place, label in enumerate(labels) if label != -100)])
    return list(ids[:-1] if ids[-1] == given.tokenizer.eos_token_id else ids)


# a need of a forget loss -> what makes its answers
ALTERNATES: dict[str, Callable[[Asking], list[str]]] = {
    "refusals": refusals,
    "other_answers": other_answers,
    "own_alternates": own_alternates,
    "novice_answers": novice_answers,
}


def check_alternates(need: str, forget: Dataset, retain: Dataset) -> None:
    """Raise a `ValueError` if alternate answers cannot be made of these rows, or some of those given are missing."""
    if "alternate" in forget.column_names:
        missing = [number for number, text in enumerate(forget["alternate"]) if not text]
        if missing:
            raise ValueError(
                f"`train_dataset` has no `alternate` in row {missing[0]} ({len(missing)} have none). Give every row "
                "one, or remove the column to have them made."
            )
    if "prompt" not in forget.column_names and need != "novice_answers":
        raise ValueError(
            f"`train_dataset` has rows without a prompt, but the forget loss needs another answer to each ({need!r}). "
            "Give rows of `prompt` and `completion`, or another `forget_loss`."
        )
    if need == "other_answers" and "completion" not in retain.column_names:
        raise ValueError(
            "`retain_dataset` has rows without a completion, but the forget loss takes other answers from there. Give "
            "rows of `prompt` and `completion`, or the column `alternate` in `train_dataset`."
        )


def alternates(need: str, given: Asking) -> list[str]:
    """An alternate answer for each forget row: the user's own, or made for this need."""
    if "alternate" in given.forget.column_names:
        return list(given.forget["alternate"])
    return ALTERNATES[need](given)


def alternate_rows(texts: Sequence[str], given: Asking, limit: Limit | None) -> list[dict[str, Any]]:
    """
    The forget rows with these answers, as tokens: `input_ids`, `labels`, `expert`.

    Raises:
        ValueError: one is longer than what is trained at once.
    """
    found = []
    for number, text in enumerate(texts):
        row = given.forget[number]
        if "prompt" not in row:
            own = _asked(*given.rows[number], given)
            ids = given.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            found.append({"input_ids": [*own, *ids], "labels": [*[-100] * len(own), *ids]})
        else:
            told = row["completion"]
            if isinstance(told, str):  # nothing is put between prompt and answer
                text = f"{told[: len(told) - len(told.lstrip())]}{text.lstrip()}"
            answer = text if isinstance(told, str) else [{"role": "assistant", "content": text}]
            found.append(encode_row({**row, "completion": answer}, given.tokenizer, as_chat=given.as_chat))
        if limit is not None and len(found[-1]["input_ids"]) > limit.tokens:
            raise ValueError(
                f"Row {number} of `train_dataset` has {len(found[-1]['input_ids'])} tokens with its alternate answer, "
                f"but a row can have {limit.tokens} by {limit.source}. Raise it, or shorten the row."
            )
    return found
