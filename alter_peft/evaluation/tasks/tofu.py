# SPDX-License-Identifier: Apache-2.0
"""TOFU, questions about fictitious authors: reading it, and what is asked of it (arXiv 2401.06121)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from scipy.stats import hmean

from alter_peft.evaluation.answers import Pair, spread
from alter_peft.evaluation.attacks.asking_otherwise import IDLE
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.scores import Key, Score, Scores
from alter_peft.options import check_counts

from .task import QuestionSet, Task, TaskData


# what open-unlearning's composites need beside TOFU's metrics (see `evaluation.open_unlearning`)
_MEMBERSHIP = ("loss", "loss_per_byte", "min_k_plus_plus")
_INGREDIENTS = ("rephrased_probability", "truth_share", "floored_extraction_strength", *_MEMBERSHIP)
SPLITS = ("forget01", "forget05", "forget10")  # in percent
FORGET_SETS = ("forget", "paraphrased", "after 200 tokens")
BYSTANDER_ROWS = 40  # two authors
# set -> its metrics: TOFU's and open-unlearning's, where the probability is normalised by the false answers if the
# model was not trained on the true one. Added here: the two disguised sets, the bystanders, and `unique_tokens`.
TOFU_METRICS = {
    "forget": (
        "probability",
        "rouge",
        "truth_ratio",
        "exact_memorization",
        "extraction_strength",
        "min_k",
        "unique_tokens",
        *_INGREDIENTS,
    ),
    "paraphrased": ("probability", "rouge", "exact_memorization", "extraction_strength"),
    "after 200 tokens": ("probability", "rouge", "exact_memorization", "extraction_strength"),
    "retain": ("probability", "rouge", "truth_ratio", "unique_tokens"),
    "bystanders": ("probability", "rouge", "exact_memorization"),
    "real_authors": ("normalized_probability", "rouge", "truth_ratio"),
    "world_facts": ("normalized_probability", "rouge", "truth_ratio"),
    "holdout": ("min_k", *_MEMBERSHIP),
}
GUARDED = ("forget", "paraphrased", "retain", "bystanders", "world_facts")  # the sets whose guards are measured
# TOFU's nine, of which model utility is the harmonic mean
KEPT = ("retain", "real_authors", "world_facts")
UTILITY = tuple(Key(name, metric) for name in KEPT for metric in TOFU_METRICS[name] if metric != "unique_tokens")
MODEL_UTILITY = Key("utility", "model_utility")
OTHER_ANSWERS = ("paraphrased_answer", "perturbed_answer")


@dataclass(frozen=True, kw_only=True)
class TofuData(TaskData):
    """
    One split of TOFU.

    `calibration` and `holdout` are every other row of TOFU's holdout set each, so that a method which measures its
    level on the first is not tested on the very same rows for membership.

    Attributes:
        sets: what a model is asked, by the names of `TOFU_METRICS`; pairs have their false answers, and those of
            forget and retain rows the true answer in other words.
    """

    sets: dict[str, list[Pair]]

    @property
    def question_sets(self) -> list[QuestionSet]:
        """The sets, each with TOFU's metrics."""
        return [
            QuestionSet(name, pairs, TOFU_METRICS[name], name in FORGET_SETS, name in GUARDED)
            for name, pairs in self.sets.items()
        ]

    @property
    def kept_sets(self) -> dict[str, Sequence[Pair]]:
        """The three sets that model utility is made of."""
        return {name: self.sets[name] for name in KEPT}

    @property
    def bystander_sets(self) -> dict[str, Sequence[Pair]]:
        """The bystanders that are asked, if there are any."""
        return {name: pairs for name, pairs in self.sets.items() if name == "bystanders"}

    def computed_scores(self, scores: Scores) -> list[Score]:
        """Model utility, a score without rows."""
        parts = [scores[key] for key in UTILITY]
        settings = {name: value for part in parts for name, value in part.settings.items() if name != "is_forget"}
        utility = model_utility([part.value for part in parts])
        return [Score(*MODEL_UTILITY[:2], utility, average="other", settings=settings)]


def read_tofu(
    source: str | Path,
    split: str = "forget01",
    retain_rows: int | None = None,
    rows: int | None = None,
    bystander_rows: int | None = None,
) -> TofuData:
    """
    Read a split of TOFU.

    Args:
        source: a folder with `forget01.jsonl` and so on (or `.json`, also with one object a line), or a Hub data set
            with these configurations, such as `"locuslab/TOFU"`.
        split: `"forget01"`, `"forget05"` or `"forget10"`: percent of the authors.
        retain_rows: the first so many rows are retained alone; all by default.
        rows: so many questions of retain, bystanders, real authors and world facts are asked, spread evenly over each;
            all by default. Forget and holdout rows are always asked in full.
        bystander_rows: so many of the retain rows after the first `retain_rows` are bystanders; by default 40, which
            are two authors, as far as there are any.

    Raises:
        ValueError: a split, file, configuration or column that is not there, a number below 1, more bystanders than
            there are, or retained rows of which none has false answers.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, but must be one of {list(SPLITS)}.")
    check_counts(retain_rows=retain_rows, rows=rows)
    if bystander_rows is not None and bystander_rows < 0:
        raise ValueError(f"`bystander_rows` is {bystander_rows}, but must be 0 or more.")
    percent = split.removeprefix("forget")
    retain_name, holdout_name = f"retain{100 - int(percent)}", f"holdout{percent}"  # what is retained, and never seen
    perturbed = _read(source, f"{split}_perturbed", "paraphrased_question", *OTHER_ANSWERS)
    forget, forget_asked = [_pair(row) for row in _read(source, split)], [_pair(row) for row in perturbed]
    if [pair[:2] for pair in forget] != [pair[:2] for pair in forget_asked]:
        raise ValueError(
            f"`source` is {str(source)!r}, where {split!r} and '{split}_perturbed' are not of the same questions. "
            "Take both from the same version of TOFU."
        )
    known = [_pair(row) for row in _read(source, retain_name)]
    retain, others = known[:retain_rows], known[len(known) if retain_rows is None else retain_rows :]
    if bystander_rows is not None and bystander_rows > len(others):
        raise ValueError(
            f"`bystander_rows` is {bystander_rows}, but {len(others)} of the {len(known)} rows of {retain_name!r} are "
            "left. Lower it, or `retain_rows`."
        )
    bystanders = others[: BYSTANDER_ROWS if bystander_rows is None else bystander_rows]
    unseen = [_pair(row) for row in _read(source, holdout_name)]
    if len(unseen) < 2:
        raise ValueError(
            f"`source` is {str(source)!r}, where {holdout_name!r} has {len(unseen)} rows, but calibration and "
            "membership inference need one each. Take TOFU as it was published."
        )
    calibration, holdout = unseen[::2], unseen[1::2]
    sets = {
        "forget": forget_asked,
        "paraphrased": [Pair(row["paraphrased_question"], row["answer"]) for row in perturbed],
        "after 200 tokens": [Pair(IDLE + pair.prompt, pair.completion) for pair in forget],
        "retain": spread(_retain_asked(source, retain), rows),
        **({"bystanders": spread(bystanders, rows)} if bystanders else {}),
        **{
            name: spread(list(map(_pair, _read(source, f"{name}_perturbed", "perturbed_answer"))), rows)
            for name in ("real_authors", "world_facts")
        },
        "holdout": holdout,
    }
    settings = {"tofu": split, "retain_rows": retain_rows, "rows": rows}
    return TofuData(
        forget=forget, retain=retain, bystanders=bystanders, calibration=calibration, holdout=holdout,
        paraphrased=sets["paraphrased"], sets=sets,
        settings={**settings, "bystander_rows": len(bystanders)} if bystanders else settings,
    )  # fmt: skip


def _retain_asked(source: str | Path, retain: Sequence[Pair]) -> list[Pair]:
    """The retained rows that have false answers."""
    kept = {pair[:2] for pair in retain}
    asked = [pair for row in _read(source, "retain_perturbed", *OTHER_ANSWERS) if (pair := _pair(row))[:2] in kept]
    if not asked:
        raise ValueError(
            f"`source` is {str(source)!r}, where no row of 'retain_perturbed' is among the {len(retain)} retained "
            "ones. Raise `retain_rows`, or take both from the same version of TOFU."
        )
    return asked


def _pair(row: dict[str, Any]) -> Pair:
    """A row with what it has of false answers (one may stand alone) and of the true one in other words."""
    wrong = row.get("perturbed_answer", ())
    wrong = (wrong,) if isinstance(wrong, str) else tuple(wrong)
    return Pair(row["question"], row["answer"], wrong, row.get("paraphrased_answer"))


def _read(source: str | Path, name: str, *columns: str) -> list[dict[str, Any]]:
    rows = _read_folder(Path(source), name) if Path(source).is_dir() else _read_hub(str(source), name)
    if not rows:
        raise ValueError(f"`source` is {str(source)!r}, where {name!r} has no rows.")
    for number, row in enumerate(rows):
        missing = [column for column in ("question", "answer", *columns) if not row.get(column)]
        if missing:
            raise ValueError(
                f"`source` is {str(source)!r}, where row {number} of {name!r} has no {missing}, but only {list(row)}. "
                "Take TOFU as it was published."
            )
    return rows


def _read_folder(folder: Path, name: str) -> list[dict[str, Any]]:
    files = [folder / f"{name}.jsonl", folder / f"{name}.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"`source` is {str(folder)!r}, which has neither {files[0].name!r} nor {files[1].name!r}.")
    try:
        with file.open(encoding="utf-8-sig") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"`source`: {file} is not one JSON object a line ({error}).") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"`source`: {file} is not one JSON object a line, but its row {number} is {row!r:.80}.")
    return rows


def _read_hub(source: str, name: str) -> list[dict[str, Any]]:
    try:
        return list(load_dataset(source, name, split="train"))
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"`source` is {source!r}, whose {name!r} could not be read ({error}). Give a folder with {name}.jsonl, or "
            f"the name of a Hub data set with a configuration {name!r} and a split 'train'."
        ) from error


def model_utility(scores: Sequence[float]) -> float:
    """
    Harmonic mean of TOFU's nine: probability, ROUGE-L and truth ratio on retain, real authors and world facts.

    It is 0 where one of them is.

    Raises:
        ValueError: there are not nine of them.
    """
    if len(scores) != 9:
        raise ValueError(f"`scores` has {len(scores)} values, but model utility is the harmonic mean of nine.")
    return float(hmean(scores))


TOFU = Task(
    read=lambda tokenizer, source, **options: read_tofu(source, **options),
    caption="TOFU: some fictitious authors are forgotten, the others kept",
    packages=("rouge_score",),
    metrics={"model_utility": Metric(caption="harmonic mean of the scores on what is kept, in TOFU of nine")},
)
