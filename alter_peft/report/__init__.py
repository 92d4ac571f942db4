# SPDX-License-Identifier: Apache-2.0
"""What was measured, drawn: tables, figures, a page."""

from .reading import read_benchmark
from .report import report_tables, write_report
from .summary import Benchmark
from .token_page import token_page
from .trade import evaluate_sets, format_table, plot_trade, write_results


__all__ = [
    "Benchmark",
    "evaluate_sets",
    "format_table",
    "plot_trade",
    "read_benchmark",
    "report_tables",
    "token_page",
    "write_report",
    "write_results",
]
