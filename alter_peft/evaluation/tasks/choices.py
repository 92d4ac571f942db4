# SPDX-License-Identifier: Apache-2.0
"""Hazard-style multiple choice (WMDP, MMLU) through lm-evaluation-harness: tasks of its own and local files."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import mean, stdev
from string import ascii_uppercase
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from alter_peft.evaluation.answers import spread
from alter_peft.evaluation.metrics.metric import Metric
from alter_peft.evaluation.scores import Score
from alter_peft.options import check_counts
from alter_peft.tuner.base_pass import evaluating

from .choice_data import SUFFIXES, read_questions
from .task import Task, TaskData


# Seed of the harness for the examples of tasks that have some
FEWSHOT_SEED = 1234


class Form(NamedTuple):
    """
    How a local question is asked: its prompt, and the continuations whose log-likelihoods are compared.

    metrics: of the harness; `acc_norm` divides log-likelihoods by the length of the choices.
    """

    prompt: Callable[[dict[str, Any]], str]
    continuations: Callable[[dict[str, Any]], list[str]]
    metrics: tuple[str, ...]


def _listed(row: dict[str, Any]) -> str:
    subject = str(row.get("subject") or "").replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False)]
    return "\n".join([heading + row["question"].strip(), *lines, "Answer:"])


# The zero-shot prompts of the harness for MMLU and WMDP, and for ARC
FORMS = {
    "letters": Form(_listed, lambda row: list(ascii_uppercase[: len(row["choices"])]), ("acc",)),
    "texts": Form(
        lambda row: f"Question: {row['question']}\nAnswer:", lambda row: row["choices"], ("acc", "acc_norm")
    ),
}


@dataclass(frozen=True, kw_only=True)
class ChoiceData(TaskData):
    """
    Multiple-choice tasks, as lm-evaluation-harness has them.

    The scores are accuracies, of the set that has the name of the task: `acc`, and `acc_norm` where the harness has
    it. A group, such as `mmlu`, gets the harness's own mean of its tasks; rows are 1 for a right answer and 0 for a
    wrong one, task after task. No chat template is used, as in the published figures.

    Attributes:
        tasks: those of the harness, by the names of their scores.
        limit: at most so many questions of a task.
    """

    tasks: dict[str, Any]
    limit: int | None = None

    def other_scores(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> list[Score]:
        """The accuracies; the model is handed to the harness as it is."""
        check_counts(batch_size=batch_size)
        with evaluating(model):
            found = _run(_wrap(model, tokenizer, batch_size or 8), self.tasks, self.limit)
        return [
            replace(score, settings=self.settings)
            for name, task in self.tasks.items()
            for score in _scores(found, name, _leaves(task))
        ]

    def each(self) -> dict[str, ChoiceData]:
        """The tasks one by one, by name."""
        return {name: replace(self, tasks={name: task}) for name, task in self.tasks.items()}


def read_choices(tasks: Sequence[str], limit: int | None = None, form: str = "letters") -> ChoiceData:
    """
    Multiple-choice tasks: what can be said of them without a model.

    A task is a name that lm-evaluation-harness knows (`wmdp_bio`, `mmlu`, `arc_easy`, ...), asked as the harness asks
    it, or a local file, which needs no network: rows `{"question", "choices", "answer"}` in JSON lines (.jsonl) or one
    JSON list (.json), either may be gzipped; `answer` is the place of the right choice, from 0, or its text. A row's
    `subject`, if it has one, is named as in MMLU.

    Args:
        limit: at most so many questions of a task: the first ones of a task of the harness, as `--limit` there;
            of a local file, which may be sorted by subject, some spread over it.
        form: how local questions are asked: `"letters"` lists the choices and compares their letters, as MMLU and WMDP
            do, so that the figures are theirs; `"texts"` compares the choices themselves, as ARC does, which small
            models need: to them all letters are alike.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: a task that is neither known nor a file, is no multiple choice or cannot be loaded; a row that
            lacks a column, or whose answer is none of its choices.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"`tasks` is {tasks!r}, but must be a list of names and files with at least one of them.")
    if len(set(map(task_name, tasks))) < len(tasks):
        raise ValueError(f"`tasks` is {list(tasks)}, two of which have the same name. Rename or remove one.")
    if form not in FORMS:
        raise ValueError(f"`form` is {form!r}, but must be one of {list(FORMS)}.")
    check_counts(limit=limit)
    local = {task_name(task): _questions(task) for task in tasks if task.endswith(SUFFIXES)}
    _require_harness()
    with _quiet():
        known = _known_tasks([task for task in tasks if not task.endswith(SUFFIXES)])
        mine = {name: _local_task(name, rows, FORMS[form], limit) for name, rows in local.items()}
    built = {name: (known | mine)[name] for name in map(task_name, tasks)}
    twice = sorted(mine.keys() & {leaf.task_name for task in known.values() for leaf in _leaves(task)})
    if twice:
        raise ValueError(f"`tasks` has a file named {twice[0]!r}, as a task of the harness is. Rename the file.")
    return ChoiceData(tasks=built, limit=limit, settings={"limit": limit, "form": form})


def standard_error(score: Score) -> float:
    """Standard error of a mean over rows, as the harness reports it: sample standard deviation / sqrt(rows)."""
    return stdev(score.rows) / math.sqrt(len(score.rows))


def _questions(task: str) -> list[dict[str, Any]]:
    try:
        return read_questions(task)
    except ValueError as error:
        raise ValueError(f"`tasks` has {task!r}, but it cannot be asked. {error}") from error


def task_name(task: str) -> str:
    """The name of a task in the results: a file's own, without folder and suffix."""
    return Path(task).name.split(".json")[0] if task.endswith(SUFFIXES) else task


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(
            "Multiple choice needs lm-evaluation-harness, which is not installed: `pip install alter-peft[eval]`."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings that a model and a task were made in memory, as they are meant to be here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wrap(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as the harness's: in the context's autocast, which it would switch off, and with a float32 softmax."""
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    own = copy.deepcopy(tokenizer)  # the harness gives a tokenizer a padding token
    precision = {"mixed_precision_dtype": autocast, "softmax_dtype": torch.float32}
    model.tie_weights = lambda: None  # they are tied already, and those of a module that PEFT wraps cannot be again
    try:
        with _quiet():
            return HFLM(model, tokenizer=own, batch_size=batch_size, **precision)
    finally:
        del model.tie_weights


def _local_task(name: str, rows: list[dict[str, Any]], form: Form, limit: int | None) -> Any:
    """Local questions as a task of the harness."""
    from lm_eval.api.task import ConfigurableTask

    asked = spread(rows, limit)
    docs = [
        {"prompt": form.prompt(row), "continuations": form.continuations(row), "answer": row["answer"]}
        for row in asked
    ]
    data = DatasetDict({"test": Dataset.from_list(docs)})
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "continuations",
            "doc_to_target": "answer",
            "metric_list": [{"metric": metric} for metric in form.metrics],
        }
    )


def _known_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Tasks and groups of the harness by name; a tag is the list of tasks that it stands for."""
    from lm_eval.tasks import TaskManager

    if not names:
        return {}  # the manager reads thousands of files
    manager, found = TaskManager(), {}
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 3)
            raise ValueError(
                f"`tasks` has {name!r}, which is neither a task of lm-evaluation-harness (close to it: {close}) nor a "
                f"file that ends in one of {list(SUFFIXES)}. Correct it."
            )
        try:
            loaded = manager.load(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The data of the task {name!r} cannot be loaded ({error}). Without a network, give a local file."
            ) from error
        task = loaded["groups"].get(name) or loaded["tasks"].get(name) or list(loaded["tasks"].values())
        other = [leaf.task_name for leaf in _leaves(task) if "acc" not in leaf.aggregation()]
        if other:
            raise ValueError(f"`tasks` has {name!r}, but {other[0]!r} has no accuracy. Leave it out.")
        found[name] = task
    return found


def _leaves(task: Any) -> list[Any]:
    """The tasks in a group or under a tag, or the task itself."""
    from lm_eval.api.group import Group

    if isinstance(task, list):
        return task
    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


def _run(lm: Any, built: dict[str, Any], limit: int | None) -> Any:
    """What the harness makes of the tasks, each evaluated once."""
    from lm_eval.api.group import Group
    from lm_eval.evaluator import evaluate

    leaves = {leaf.task_name: leaf for task in built.values() for leaf in _leaves(task)}
    for leaf in leaves.values():
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config("num_fewshot", 0)
        leaf.set_fewshot_seed(FEWSHOT_SEED)
    groups = [task for task in built.values() if isinstance(task, Group)]
    groups += [inner for group in groups for inner in group.get_all_groups()]
    tasks = {"tasks": leaves, "groups": {group.name: group for group in groups}}
    return evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0)


def _scores(found: Any, name: str, leaves: list[Any]) -> list[Score]:
    """Scores under the name that was asked for, or of each task where the harness has no mean for it."""
    rows = {leaf.task_name: found["samples"][leaf.task_name] for leaf in leaves}
    scores = []
    for metric in ("acc", "acc_norm"):
        values = {key: found["results"].get(key, {}).get(f"{metric},none") for key in (name, *rows)}
        for key in [name] if values[name] is not None else [key for key in rows if values[key] is not None]:
            answers = [float(row[metric]) for task in (rows if key == name else [key]) for row in rows[task]]
            value = float(values[key])
            by_rows = math.isclose(mean(answers), value, rel_tol=1e-6, abs_tol=1e-9)  # a group may weigh tasks alike
            scores.append(Score(key, metric, value, answers, "mean" if by_rows else "other"))
    return scores


CHOICES = Task(
    read=lambda tokenizer, tasks, **options: read_choices(tasks, **options),
    caption="hazard-style multiple choice through lm-evaluation-harness",
    packages=("lm_eval",),
    is_attacked=False,
    metrics={
        "acc": Metric(caption="accuracy"),
        "acc_norm": Metric(caption="accuracy, the log-likelihoods of the choices over their lengths"),
    },
)
