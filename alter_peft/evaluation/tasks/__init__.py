# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that a model is measured on, by name: how their rows are read, what is asked, and by which metrics."""

from __future__ import annotations

from .book_data import BOOKS, read_books
from .books import BookData, compare_books
from .choices import CHOICES, ChoiceData, read_choices, standard_error
from .task import QuestionSet, Task, TaskData, measure_task
from .tofu import FORGET_SETS, TOFU, TOFU_METRICS, TofuData, read_tofu


__all__ = [
    "FORGET_SETS",
    "TASKS",
    "TOFU_METRICS",
    "BookData",
    "ChoiceData",
    "QuestionSet",
    "Task",
    "TaskData",
    "TofuData",
    "compare_books",
    "measure_task",
    "read_books",
    "read_choices",
    "read_tofu",
    "standard_error",
]

TASKS: dict[str, Task] = {"tofu": TOFU, "books": BOOKS, "choices": CHOICES}
