# SPDX-License-Identifier: Apache-2.0
"""Data as people have it -> rows: one reader for every command."""

from .columns import COLUMNS_HELP, parse_columns
from .rows import Rows, read_all, read_rows


__all__ = ["COLUMNS_HELP", "Rows", "parse_columns", "read_all", "read_rows"]
