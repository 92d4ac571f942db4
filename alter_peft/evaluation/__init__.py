# SPDX-License-Identifier: Apache-2.0
"""The measure of unlearning: what a model still knows, what it kept, and how far both are from an oracle."""

from .answers import AnswerScores, Pair, chat_or_plain, encode_pair, generate_answers, score_answers
from .attack_prompts import IDLE
from .attacks import ATTACKS, Attacked, Rows, attack
from .book_data import BookData, read_books
from .books import compare_books, evaluate_books
from .choices import evaluate_choices, standard_error
from .guards import expert_usage, fluency, high_entropy, measure_guards
from .measure import METRICS, Asked, Score, measure
from .oracle import Band, Comparison, Distance, band, compare_with_oracles, distances
from .results import Result
from .tofu import FORGET_SETS, TOFU_METRICS, TofuData, ask_tofu, evaluate_tofu, measure_tofu, read_tofu


__all__ = [
    "ATTACKS",
    "FORGET_SETS",
    "IDLE",
    "METRICS",
    "TOFU_METRICS",
    "AnswerScores",
    "Asked",
    "Attacked",
    "Band",
    "BookData",
    "Comparison",
    "Distance",
    "Pair",
    "Result",
    "Rows",
    "Score",
    "TofuData",
    "ask_tofu",
    "attack",
    "band",
    "chat_or_plain",
    "compare_books",
    "compare_with_oracles",
    "distances",
    "encode_pair",
    "evaluate_books",
    "evaluate_choices",
    "evaluate_tofu",
    "expert_usage",
    "fluency",
    "generate_answers",
    "high_entropy",
    "measure",
    "measure_guards",
    "measure_tofu",
    "read_books",
    "read_tofu",
    "score_answers",
    "standard_error",
]
