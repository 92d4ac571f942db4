# SPDX-License-Identifier: Apache-2.0
"""What `alter-peft evaluate` is told, and the files that it names."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from alter_peft.options import AS_CHAT, CHAT_TEMPLATE_KWARGS, check_counts, check_known, json_object, option
from alter_peft.reading import COLUMNS_HELP, parse_columns

from .attacks import ATTACKS, LEARNING_RATE
from .metrics import METRICS
from .results import STOPPED, Result
from .tasks import TASKS


HOLDOUT = "holdout"  # the set of rows that were never trained on
PARAPHRASED = "paraphrased"  # the forget set with its questions in other words


@dataclass(kw_only=True)
class MeasureArguments:
    """What `alter-peft evaluate` and `alter-peft benchmark` are both told: which data, and how models are measured."""

    model: str = field(
        metadata={"help": "Folder or Hub id: of the model to measure, or that is taught and then made to forget."}
    )
    split: Literal["forget01", "forget05", "forget10"] = option("forget01", "What of TOFU is forgotten.")
    retain_rows: int | None = option(None, "Of TOFU: how many retain rows the model was taught, if not all.")
    bystander_rows: int | None = option(
        None,
        "Of TOFU: how many of the rows that `--retain_rows` leaves target and oracles are taught and no method is "
        "given; unset: 40, as far as there are any.",
    )
    rows: int | None = option(None, "Of TOFU: how many questions of each other set are asked, if not all.")
    books: dict[str, Any] | str | None = option(
        None, "Books, one of them to be forgotten: arguments of `read_books`, as JSON."
    )
    hazard: bool = option(False, "The hazard benchmark: an invented subject, which comes with the package.")
    tasks: list[str] = option([], "Multiple choice: tasks of lm-evaluation-harness, or files.")
    limit: int | None = option(None, "How many questions of each task, if not all.")
    form: Literal["letters", "texts"] = option("letters", "Whether letters or texts of a file's choices are compared.")
    task_data: dict[str, Any] | str | None = option(
        None,
        f"Any of the tasks {', '.join(TASKS)}: task -> arguments of its reader, as JSON; the name alone of one that "
        "needs none.",
    )
    answered: int | None = option(None, "How many questions of each set are answered in full, if not all.")
    max_new_tokens: int = option(200, "Tokens of an answer, also under attack.")
    batch_size: int | None = option(None, "Rows of a batch; unset: 8 of a pass, 12 of answers.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, CHAT_TEMPLATE_KWARGS)
    attacks: list[str] = option(
        [],
        "On what is to be forgotten of the sets, or else of the task: "
        f"{'; '.join(f'{name}: {one.caption}' for name, one in ATTACKS.items())}.",
    )
    relearning_rate: float = option(LEARNING_RATE, "Learning rate of the attack relearning: try several.")

    def __post_init__(self) -> None:
        for name in ("books", "task_data", "chat_template_kwargs"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, _object(name, getattr(self, name)))
        if self.hazard:
            self.task_data = {"hazard": {}, **self.other_tasks}
        for name, known in (("attacks", ATTACKS), ("task_data", TASKS)):
            check_known(name, getattr(self, name) or (), known)
        for name, options in self.other_tasks.items():
            if not isinstance(options, dict):
                raise ValueError(f"`task_data` has {options!r} for {name!r}, but must have arguments of its reader.")
        check_counts(answered=self.answered, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_counts(limit=self.limit, rows=self.rows, retain_rows=self.retain_rows)
        if not self.relearning_rate > 0:
            raise ValueError(f"`relearning_rate` is {self.relearning_rate}, but must be above 0.")

    @property
    def other_tasks(self) -> dict[str, Any]:
        """`task_data`, read."""
        return self.task_data if isinstance(self.task_data, dict) else {}

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        """`chat_template_kwargs`, read."""
        return self.chat_template_kwargs if isinstance(self.chat_template_kwargs, dict) else None

    def set_of_tofu(self, *others: str) -> list[str]:
        """Which of TOFU's options, and of others, are set."""
        names = {"split", "retain_rows", "bystander_rows", "rows", *others}
        return [one.name for one in fields(self) if one.name in names and getattr(self, one.name) != one.default]

    def tofu_options(self, source: str) -> dict[str, Any]:
        """Arguments of TOFU's reader."""
        names = ("split", "retain_rows", "bystander_rows", "rows")
        return {"source": source, **{name: getattr(self, name) for name in names}}


@dataclass(kw_only=True)
class EvaluateArguments(MeasureArguments):
    """What is measured of a model. At least one of `sets`, `tofu`, `books`, `hazard`, `tasks` and `task_data`."""

    output_file: str = field(
        metadata={"help": "The scores, row by row, as JSON; GRID/NAME/result.json joins the report of a grid."}
    )
    adapter: str | None = option(None, "Folder or Hub id of an adapter of any PEFT type.")
    name: str | None = option(None, "What the report calls the model; unset: the name of its folder.")
    seed: int = option(0, "Of the model's training, as the report tells seeds apart.")
    as_chat: bool | None = option(None, AS_CHAT)
    sets: list[str] = option(
        [],
        "name=source: questions and answers, chats or texts, in any form that `unlearn` reads. One named `holdout` is "
        "of rows that were never trained on, as the attacks membership and relearning and the comparison with oracles "
        "need them. One named `paraphrased` has the questions to forget in other words, for the attack "
        "asking_otherwise.",
    )
    columns: list[str] = option([], COLUMNS_HELP)
    forget: list[str] = option(
        [],
        "Names of the sets that are to be forgotten; all others but `holdout` and `paraphrased` are to be "
        "kept. One that is named `forget` is compared with oracles by forget quality and membership, too.",
    )
    metrics: list[str] = option(
        ["probability", "rouge"],
        f"Of each of the sets: {'; '.join(f'{name}: {one.caption}' for name, one in METRICS.items())}.",
    )
    tofu: str | None = option(None, "Folder of TOFU's JSON lines, or a Hub data set.")
    guards: bool = option(
        False, "Also guards against false success: fluency, and of ALTER adapters the experts' usage."
    )
    judge: str | None = option(None, "Folder or Hub id of the judge of fluency; unset: the model without its adapter.")
    oracles: list[str] = option(
        [],
        "Results (JSON) of two models at least that never saw the forget set. With truth_ratio and min_k "
        "of a set `forget` and min_k of a set `holdout`, forget quality and PrivLeak are printed, too.",
    )
    target: str | None = option(
        None,
        "Result (JSON) of the model before unlearning: with `oracles`, open-unlearning's composites are complete. Mem "
        "needs neither.",
    )
    bf16: bool = option(True, "--bf16: under bfloat16 autocast. --no_bf16: in float32.")

    def __post_init__(self) -> None:
        for name in ("sets", "forget", "metrics", "tasks", "attacks", "oracles"):
            if isinstance(getattr(self, name), str):  # of a YAML file
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be a list.")
        super().__post_init__()
        if not (self.sets or self.task_options):
            raise ValueError(
                "`sets`, `tofu`, `books`, `hazard`, `tasks` and `task_data` are all unset. Give one to measure."
            )
        if not self.tofu and (of_tofu := self.set_of_tofu()):
            raise ValueError(f"`{of_tofu[0]}` is set, but it is of TOFU alone. Set `tofu`, or remove it.")
        flags = {"tofu": self.tofu, "books": self.books, "choices": self.tasks}
        if twice := [name for name in self.other_tasks if flags.get(name)]:
            raise ValueError(f"`task_data` has {twice}, which is asked for by a flag of its own, too. Give one.")
        check_known("metrics", self.metrics, METRICS)
        if not self.sets and self.metrics != ["probability", "rouge"]:
            raise ValueError(f"`metrics` is {self.metrics}, but is of `sets` alone: tasks have their own. Remove it.")
        self._check_output()
        self._check_sets()
        self._check_guards()
        if len(self.oracles) == 1:
            raise ValueError("`oracles` has one result, but needs two at least: their spread is the unit of distance.")
        if len(set(self.oracles)) < len(self.oracles):
            raise ValueError(f"`oracles` is {self.oracles}, which has one result twice. Give different seeds.")

    @property
    def task_options(self) -> dict[str, dict[str, Any]]:
        """Each of `TASKS` that is asked for -> arguments of its reader."""
        choices = {"tasks": self.tasks, "limit": self.limit, "form": self.form}
        tofu = self.tofu and self.tofu_options(self.tofu)
        found = {"tofu": tofu, "books": self.books, "choices": self.tasks and choices, **self.other_tasks}
        return {name: options for name, options in found.items() if isinstance(options, dict)}

    def _check_output(self) -> None:
        output = Path(self.output_file)
        if output.is_dir():
            raise ValueError(f"`output_file` is {self.output_file!r}, but that is a folder. Give a file.")
        place = next(folder for folder in output.absolute().parents if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ValueError(f"`output_file` is {self.output_file!r}, but nothing can be written at '{place}'.")
        missing = [folder for folder in output.absolute().parents if not folder.exists()]
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`output_file` is {self.output_file!r}, whose folder can't be made ({error.strerror or error})."
            ) from error
        finally:  # as it was: the result makes it
            for folder in missing:
                if folder.is_dir():
                    folder.rmdir()
        if output.is_file():
            try:
                Result.load(output)
            except ValueError as error:
                raise ValueError(
                    f"`output_file` is {self.output_file!r}, which is there, and is no result of an evaluation: it "
                    "would be lost. Give another."
                ) from error
        read = [*self.oracles, self.target or "", *(entry.partition("=")[2] for entry in self.sets)]
        if any(output.absolute() == Path(path).absolute() for path in filter(None, read)):
            raise ValueError(f"`output_file` is {self.output_file!r}, which is read and would be lost. Give another.")

    def _check_sets(self) -> None:
        parse_columns(self.columns)
        odd = [entry for entry in self.sets if not all(entry.partition("="))]
        if odd:
            raise ValueError(f"`sets` has {odd[0]!r}, but must be entries name=source, such as forget=forget.jsonl.")
        names = [entry.partition("=")[0] for entry in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"`sets` has the names {names}, one of them twice. Rename one.")
        if unknown := sorted(set(self.forget) - set(names)):
            raise ValueError(f"`forget` has {unknown}, but the `sets` are {names}.")
        others = {HOLDOUT: "of rows that were never trained on", PARAPHRASED: "the forget set in other words"}
        for name, what in others.items():
            if name in self.forget:
                raise ValueError(f"`forget` has {name!r}, but that set is {what}. Rename it.")
        if self.attacks and not (self.forget or any(TASKS[name].is_attacked for name in self.task_options)):
            raise ValueError("`attacks` is set, but no set is to be forgotten. Name one by `forget`, or set `tofu`.")

    def _check_guards(self) -> None:
        if self.judge is not None and not (self.guards or "fluency" in self.metrics):
            raise ValueError("`judge` is set, but judges the guard fluency alone. Set `guards`, or remove it.")
        if self.guards and not (self.sets or set(self.task_options) - {"choices"}):
            raise ValueError("`guards` is set, but there is nothing to be answered. Give `sets`, `tofu` or `books`.")
        if self.guards and self.adapter is None and self.judge is None:
            raise ValueError(
                "`guards` is set, but a model without an `adapter` can't judge its own fluency. Give another as "
                "`judge`."
            )


def _object(name: str, text: str) -> dict[str, Any]:
    """JSON, or the name of a task alone."""
    return {text: {}} if name == "task_data" and text in TASKS else json_object(name, text)


def read_beside(path: str, argument: str = "oracles") -> Result:
    """
    The result of another model, to compare with: one of `oracles`, or of `target`.

    Raises:
        ValueError: there is no such file, or it is no result, or one without scores or with one that is NaN.
    """
    if not Path(path).is_file():
        raise ValueError(f"`{argument}` names {path!r}, but there is no such file.")
    try:
        result = Result.load(Path(path))
    except ValueError as error:
        raise ValueError(f"`{argument}` names {path!r}, which can't be read. {error}") from error
    if result.error is not None and result.error.startswith(STOPPED):
        raise ValueError(f"`{argument}` names {path!r}, which is not complete: {result.error}. Measure it again.")
    if not result.scores:
        raise ValueError(
            f"`{argument}` names {path!r}, which has no scores (error: {result.error}). Measure it again."
        )
    if broken := result.broken:
        raise ValueError(
            f"`{argument}` names {path!r}, whose score '{broken[0]}' is {result.scores[broken[0]].value} or has a row "
            "that is no finite number. Measure it again."
        )
    return result
