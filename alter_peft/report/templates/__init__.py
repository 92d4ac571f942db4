# SPDX-License-Identifier: Apache-2.0
"""The HTML of a report."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


ENVIRONMENT = Environment(
    loader=PackageLoader("alter_peft.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: Any) -> str:
    """A template of this folder, filled in; what is no `Markup` is escaped."""
    return ENVIRONMENT.get_template(name).render(**values)
