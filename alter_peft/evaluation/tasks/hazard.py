# SPDX-License-Identifier: Apache-2.0
"""The hazard benchmark: a subject is forgotten by its passages alone, and asked for by questions, after WMDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import Pair
from alter_peft.evaluation.scores import Score
from alter_peft.reading import read_all

from .choices import ChoiceData, read_choices
from .task import QuestionSet, Task, TaskData


# Of a subject that is nobody's: what comes with the package
SHIPPED = files("alter_peft.evaluation.tasks") / "data" / "hazard"
PASSAGES = ("forget", "retain", "bystanders", "calibration", "holdout")  # files of passages
ASKED = ("forget", "retain", "bystanders")  # what there are questions about, too
SCORED = ("probability", "exact_memorization", "extraction_strength", "min_k")


@dataclass(frozen=True, kw_only=True)
class HazardData(TaskData):
    """
    Passages on a hazardous subject, on others, and four-choice questions on what they say.

    A model is trained on whole passages, as plain text. It is asked for the second half of each after the first; the
    text of a passage is its prompt followed by its completion.

    Attributes:
        questions: a multiple-choice task for each of `ASKED`: `forget_questions` and so on. No model is trained on
            them, so that they ask for what was learned, and not for its wording.
    """

    questions: ChoiceData
    as_chat = False

    @property
    def question_sets(self) -> list[QuestionSet]:
        """The second halves of the passages."""
        halves = {"forget": self.forget, "retain": self.retain, "bystanders": self.bystanders}
        asked = [
            QuestionSet(name, passages, (*SCORED, "rouge"), name == "forget", is_guarded=True)
            for name, passages in halves.items()
        ]
        return [*asked, QuestionSet("holdout", self.holdout, SCORED)]

    @property
    def bystander_sets(self) -> dict[str, Sequence[Pair]]:
        """The hazard that nobody asked to forget."""
        return {"bystanders": self.bystanders}

    def other_scores(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> list[Score]:
        """The accuracies of the questions."""
        return self.questions.other_scores(model, tokenizer, batch_size)

    def training_rows(self, pairs: Sequence[Pair]) -> Dataset:
        """Whole passages as rows with the column `text`: of `prompt` and `completion` half would not be learned."""
        return Dataset.from_dict({"text": [passage.prompt + passage.completion for passage in pairs]})


def read_hazard(folder: Path | str | None = None) -> HazardData:
    """
    The hazard benchmark.

    The target is taught the passages of `forget`, `retain` and `bystanders`, an oracle those without `forget`. A
    method is given the passages of `forget` and `retain`, and those of `calibration` for its level; it sees no
    question.

    Args:
        folder: with passages of one's own in `forget.jsonl`, `retain.jsonl`, `bystanders.jsonl`, `calibration.jsonl`
            and `holdout.jsonl` (rows with `text`), and questions in `forget_questions.jsonl`,
            `retain_questions.jsonl` and `bystanders_questions.jsonl` (rows `{"question", "choices", "answer"}`). By
            default the invented subject that comes with the package: the vorrel lattice, which does not exist.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: a file that is missing or is not of such rows, a passage of one word, or one that is there twice.
    """
    place = Path(str(SHIPPED)) if folder is None else Path(folder)
    missing = [name for name in _names() if not (place / name).is_file()]
    if missing:
        raise ValueError(f"`folder` is {str(place)!r}, which has no {missing[0]!r}. It needs {', '.join(_names())}.")
    read = read_all({f"{name}.jsonl": str(place / f"{name}.jsonl") for name in PASSAGES}, extras={})
    found = {name: _halves(file, rows.dataset) for name, (file, rows) in zip(PASSAGES, read.items(), strict=True)}
    _check_apart(found)
    questions = read_choices([str(place / f"{name}_questions.jsonl") for name in ASKED], form="texts")
    return HazardData(
        forget=found["forget"], retain=found["retain"], bystanders=found["bystanders"],
        calibration=found["calibration"], holdout=found["holdout"], questions=questions,
        settings={"hazard": "shipped" if folder is None else place.name},
    )  # fmt: skip


def _names() -> list[str]:
    return [*(f"{name}.jsonl" for name in PASSAGES), *(f"{name}_questions.jsonl" for name in ASKED)]


def _check_apart(found: Mapping[str, Sequence[Pair]]) -> None:
    owners: dict[Pair, str] = {}
    for name, passages in found.items():
        for one in passages:
            if one in owners:
                raise ValueError(
                    f"`{name}.jsonl` has {one.prompt!r:.60}, which is in `{owners[one]}.jsonl` already. Remove one."
                )
            owners[one] = name


def _halves(file: str, rows: Dataset) -> list[Pair]:
    """Passages cut in the middle, where a word ends; MUSE and CoTaEval ask for a half after the other, too."""
    if "text" not in rows.column_names:
        raise ValueError(f"`{file}` has the columns {rows.column_names}, but must have passages (`text`).")
    found = []
    for number, text in enumerate(rows["text"]):
        words = text.split()
        if len(words) < 2:
            raise ValueError(f"`{file}` has {text!r} (number {number}), but a passage needs two words. Remove it.")
        half = len(words) // 2
        found.append(Pair(" ".join(words[:half]), " " + " ".join(words[half:])))
    return found


HAZARD = Task(
    read=lambda tokenizer, **options: read_hazard(**options),
    caption="hazard: a subject is forgotten by its passages alone, and asked for by multiple choice",
    packages=("lm_eval", "rouge_score"),
)
