# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The measure of unlearning: what a model still knows, what it kept, and how far both are from an oracle."""

from .answers import AnswerScores, Pair, encode_pair, generate_answers, score_answers
from .book_data import BookData, read_books
from .books import compare_books, evaluate_books
from .choices import evaluate_choices
from .measure import METRICS, Asked, Score, measure
from .oracle import Band, band
from .results import Result
from .trade import evaluate_sets, format_table, plot_trade, write_results


__all__ = [
    "METRICS",
    "AnswerScores",
    "Asked",
    "Band",
    "BookData",
    "Pair",
    "Result",
    "Score",
    "band",
    "compare_books",
    "encode_pair",
    "evaluate_books",
    "evaluate_choices",
    "evaluate_sets",
    "format_table",
    "generate_answers",
    "measure",
    "plot_trade",
    "read_books",
    "score_answers",
    "write_results",
]
