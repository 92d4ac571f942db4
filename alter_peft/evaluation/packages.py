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
