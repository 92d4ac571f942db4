# SPDX-License-Identifier: Apache-2.0
"""Rows of a kind on both sides, with bystanders: files of one's own, and two settings that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scipy.stats import hmean

from alter_peft.evaluation.answers import Pair, spread
from alter_peft.evaluation.attacks.asking_otherwise import IDLE
from alter_peft.evaluation.scores import Key, Score, Scores
from alter_peft.evaluation.sets import pair_of
from alter_peft.options import check_counts
from alter_peft.reading import read_all

from .task import QuestionSet, Task, TaskData
from .tofu import FORGET_SETS, MODEL_UTILITY, TOFU_METRICS


DATA = files("alter_peft.evaluation.tasks") / "data"  # of the settings that come with the package
PARTS = ("forget", "retain", "bystanders", "bystanders_public", "calibration", "holdout")
EXTRAS = ("paraphrase", "rephrased", "wrong")
OF_UTILITY = ("probability", "rouge", "truth_ratio")  # of each set that is kept, as in TOFU
KEPT_METRICS = (*OF_UTILITY, "exact_memorization", "unique_tokens")
# set -> its metrics, as in TOFU
ROW_METRICS = {
    **{name: TOFU_METRICS[name] for name in FORGET_SETS},
    "retain": KEPT_METRICS,
    "bystanders": KEPT_METRICS,
    "bystanders public": KEPT_METRICS,
    "holdout": ("probability", *TOFU_METRICS["holdout"]),
}
BYSTANDERS = ("bystanders", "bystanders public")


@dataclass(frozen=True, kw_only=True)
class RowData(TaskData):
    """
    Rows of a kind on both sides.

    Attributes:
        sets: what a model is asked, by the names of `ROW_METRICS`.
    """

    sets: dict[str, list[Pair]]

    @property
    def question_sets(self) -> list[QuestionSet]:
        """The sets, each with its metrics: those of false answers and of other words where all rows have these."""
        found = []
        for name, pairs in self.sets.items():
            of_false = [] if all(pair.wrong for pair in pairs) else ["truth_ratio", "truth_share"]
            lacks = [*of_false, *([] if all(pair.rephrased for pair in pairs) else ["rephrased_probability"])]
            metrics = [metric for metric in ROW_METRICS[name] if metric not in lacks]
            found.append(QuestionSet(name, pairs, metrics, name in FORGET_SETS, is_guarded=True))
        return found

    @property
    def kept_sets(self) -> dict[str, Sequence[Pair]]:
        """The retain rows."""
        return {"retain": self.sets["retain"]}

    @property
    def bystander_sets(self) -> dict[str, Sequence[Pair]]:
        """The bystanders that are asked: their rows of the forget rows' kind, and of the retain rows' kind."""
        return {name: self.sets[name] for name in BYSTANDERS if name in self.sets}

    def computed_scores(self, scores: Scores) -> list[Score]:
        """Model utility, a score without rows: of what is retained and of the bystanders."""
        kept = {**self.kept_sets, **self.bystander_sets}
        keys = [Key(name, metric) for name in kept for metric in OF_UTILITY]
        parts = [scores[key] for key in keys if key in scores]
        settings = {name: value for part in parts for name, value in part.settings.items() if name != "is_forget"}
        utility = float(hmean([part.value for part in parts]))
        return [Score(*MODEL_UTILITY[:2], utility, average="other", settings=settings)]


def read_row_sets(
    forget: str,
    retain: str,
    bystanders: str | None = None,
    bystanders_public: str | None = None,
    calibration: str | None = None,
    holdout: str | None = None,
    columns: Mapping[str, str] | None = None,
    rows: int | None = None,
) -> RowData:
    """
    A task of rows in files, folders or Hub data sets, in any form that `alter-peft unlearn` reads.

    Beside a question and its answer a row may have the question in other words (`paraphrase`), the answer in other
    words (`rephrased`) and false answers (`wrong`), under these names or TOFU's.

    Args:
        forget: what is to be forgotten.
        retain: what a method is given to keep.
        bystanders: of the forget rows' kind, known to target and oracles and given to no method.
        bystanders_public: the same of the retain rows' kind.
        calibration, holdout: of the forget rows' kind and taught to nobody: what a method may measure its level on,
            and what membership is tested with.
        columns: what a row holds -> its column, where the names are not recognised.
        rows: so many questions of each set that is kept are asked, spread evenly over it; all by default.

    Raises:
        ValueError: as of `read_rows`, a row that is no question and answer, or one that is there twice.
    """
    given = (forget, retain, bystanders, bystanders_public, calibration, holdout)
    sources = {part: one for part, one in zip(PARTS, given, strict=True) if one is not None}
    return _read(sources, rows, {"files": {part: Path(one).name for part, one in sources.items()}}, columns)


def read_people(rows: int | None = None) -> RowData:
    """
    Twelve invented people: the private rows of seven are forgotten and their public ones kept, five are bystanders.

    Args:
        rows: as of `read_row_sets`.
    """
    return _read_own("people", rows)


def read_birthdays(rows: int | None = None) -> RowData:
    """
    Dates of birth of invented people, of which none can be guessed from others (Deeb and Roger, arXiv 2410.08827).

    Args:
        rows: as of `read_row_sets`.
    """
    return _read_own("birthdays", rows)


def _read_own(name: str, rows: int | None) -> RowData:
    there = {part: str(DATA / name / f"{part}.jsonl") for part in PARTS if (DATA / name / f"{part}.jsonl").is_file()}
    return _read(there, rows, {"data": name})


def _read(
    sources: Mapping[str, str], rows: int | None, settings: dict[str, Any], columns: Mapping[str, str] | None = None
) -> RowData:
    check_counts(rows=rows)
    read = {part: one.dataset for part, one in read_all(sources, columns, dict.fromkeys(sources, EXTRAS)).items()}
    pairs = {part: [pair_of(part, number, row) for number, row in enumerate(found)] for part, found in read.items()}
    _check_apart(pairs)
    forget = pairs["forget"]
    others = [row.get("paraphrase") for row in read["forget"]]
    paraphrased = [pair._replace(prompt=other) for pair, other in zip(forget, others, strict=True) if other]
    sets = {
        "forget": forget,
        "paraphrased": paraphrased,
        "after 200 tokens": [pair._replace(prompt=IDLE + pair.prompt) for pair in forget],
        **{name: spread(pairs.get(name.replace(" ", "_"), ()), rows) for name in ("retain", *BYSTANDERS)},
        "holdout": pairs.get("holdout", []),
    }
    bystanders = [pair for part in ("bystanders", "bystanders_public") for pair in pairs.get(part, ())]
    return RowData(
        forget=forget, retain=pairs["retain"], bystanders=bystanders, calibration=pairs.get("calibration", []),
        holdout=sets["holdout"], paraphrased=paraphrased, settings={**settings, "rows": rows},
        sets={name: asked for name, asked in sets.items() if asked},
    )  # fmt: skip


def _check_apart(pairs: Mapping[str, Sequence[Pair]]) -> None:
    """Every row is a question and its answer, and stands once in all parts."""
    owners: dict[tuple[str, str], str] = {}
    for part, found in pairs.items():
        for pair in found:
            if pair.turns or pair.is_text:
                raise ValueError(f"`{part}` has {pair.completion!r:.80}, which is not one answer to one question.")
            if pair[:2] in owners:
                raise ValueError(
                    f"`{part}` has {pair.prompt!r}, which is in `{owners[pair[:2]]}` already. Remove one."
                )
            owners[pair[:2]] = part


ROWS = Task(
    read=lambda tokenizer, **options: read_row_sets(**options),
    caption="questions and answers of one's own, with bystanders",
    packages=("rouge_score",),
)
PEOPLE = Task(
    read=lambda tokenizer, **options: read_people(**options),
    caption="invented people: the private rows of some are forgotten, and their public rows kept",
    packages=("rouge_score",),
)
BIRTHDAYS = Task(
    read=lambda tokenizer, **options: read_birthdays(**options),
    caption="dates of birth of invented people, none of which can be guessed from others",
    packages=("rouge_score",),
)
