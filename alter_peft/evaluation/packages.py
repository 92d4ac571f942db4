# SPDX-License-Identifier: Apache-2.0
"""Packages that only some measurements need, asked for before anything is computed."""

from __future__ import annotations

from importlib.util import find_spec


def require_packages(*names: str) -> None:
    """Raise a `ValueError` if one of them is not installed; all are of the extra `eval`."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The packages {missing} are needed for what is to be measured, and not installed. Install them with `pip "
            "install alter-peft[eval]`."
        )
