# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that a model is measured on, by name: how their rows are read, what is asked, and by which metrics."""

from __future__ import annotations

from .book_data import BOOKS
from .choices import CHOICES
from .hazard import HAZARD
from .rows import BIRTHDAYS, PEOPLE, ROWS
from .task import QuestionSet, Task, TaskData, measure_task
from .tofu import TOFU


__all__ = ["TASKS", "QuestionSet", "Task", "TaskData", "measure_task"]

TASKS: dict[str, Task] = {
    "tofu": TOFU,
    "books": BOOKS,
    "choices": CHOICES,
    "hazard": HAZARD,
    "rows": ROWS,
    "people": PEOPLE,
    "birthdays": BIRTHDAYS,
}
