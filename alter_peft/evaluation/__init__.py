# SPDX-License-Identifier: Apache-2.0
"""The measure of unlearning: what a model still knows, what it kept, and how far both are from an oracle."""

from alter_peft.chat import chat_or_plain

from .answers import AnswerScores, Pair, encode_pair, generate_answers, score_answers
from .attacks import ATTACKS, Attack, Attacked, Rows, attack
from .attacks.asking_otherwise import IDLE
from .metrics import METRICS, measure, measure_guards
from .metrics.metric import Metric
from .model_on_set import ModelOnSet
from .oracle import Band, Comparison, Distance, band, compare_with_oracles, distances
from .results import Result
from .scores import Key, Score, Scores
from .seen_tokens import SeenTokens, observe_tokens
from .tasks import TASKS, QuestionSet, Task, TaskData, measure_task
from .tasks.book_data import read_books
from .tasks.books import BookData, compare_books
from .tasks.choices import ChoiceData, read_choices, standard_error
from .tasks.hazard import HazardData, read_hazard
from .tasks.rows import RowData, read_birthdays, read_people, read_row_sets
from .tasks.tofu import FORGET_SETS, TOFU_METRICS, TofuData, read_tofu


__all__ = [
    "ATTACKS",
    "FORGET_SETS",
    "IDLE",
    "METRICS",
    "TASKS",
    "TOFU_METRICS",
    "AnswerScores",
    "Attack",
    "Attacked",
    "Band",
    "BookData",
    "ChoiceData",
    "Comparison",
    "Distance",
    "HazardData",
    "Key",
    "Metric",
    "ModelOnSet",
    "Pair",
    "QuestionSet",
    "Result",
    "RowData",
    "Rows",
    "Score",
    "Scores",
    "SeenTokens",
    "Task",
    "TaskData",
    "TofuData",
    "attack",
    "band",
    "chat_or_plain",
    "compare_books",
    "compare_with_oracles",
    "distances",
    "encode_pair",
    "generate_answers",
    "measure",
    "measure_guards",
    "measure_task",
    "observe_tokens",
    "read_birthdays",
    "read_books",
    "read_choices",
    "read_hazard",
    "read_people",
    "read_row_sets",
    "read_tofu",
    "score_answers",
    "standard_error",
]
