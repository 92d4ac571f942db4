# SPDX-License-Identifier: Apache-2.0
"""Data as people have it -> rows: one reader for every command."""

from .columns import COLUMNS_HELP, parse_columns
from .files import OFFERED
from .rows import Rows, read_all, read_rows


__all__ = ["COLUMNS_HELP", "OFFERED", "Rows", "parse_columns", "read_all", "read_rows"]
