# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock, Timeout


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """
    The lock of a folder, which the main process holds; of a run that was killed the operating system frees it.

    Raises:
        BlockingIOError: another run holds it.
    """
    if not PartialState().is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(
            f"Another run is at work on '{folder}': it holds {lock.lock_file}. Wait until it is done there, or end "
            "it, and start this one again."
        ) from error
    try:
        yield
    finally:
        lock.release()
