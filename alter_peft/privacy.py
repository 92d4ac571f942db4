# SPDX-License-Identifier: Apache-2.0
"""Nothing is sent anywhere unless the user asks for it."""

from __future__ import annotations

import os


def telemetry_is_wanted() -> bool:
    """
    Whether the user has turned telemetry on: `HF_HUB_DISABLE_TELEMETRY`, `DISABLE_TELEMETRY` or `DO_NOT_TRACK` is 0.

    These are the names that huggingface_hub reads, by which one of them alone that says no is enough.
    """
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    return any(os.environ.get(name, "").upper() in ("0", "OFF", "NO", "FALSE") for name in names)
