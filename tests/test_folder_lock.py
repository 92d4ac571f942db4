# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alter_peft.benchmark.folder_lock import folder_lock


HOLD = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print(1, flush=True)
    time.sleep(20)
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    place = tmp_path / "lora_ga-0"
    with folder_lock(place), folder_lock(tmp_path / "other"):
        with pytest.raises(
            BlockingIOError, match=r"Another run is at work on '.*lora_ga-0': it holds .*\.lock\. Wait"
        ):
            with folder_lock(place):
                pass
    with pytest.raises(RuntimeError, match="a fault"), folder_lock(place):
        raise RuntimeError("a fault")
    with folder_lock(place):
        pass


def test_a_run_that_was_killed_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(BlockingIOError), folder_lock(tmp_path):
            pass
        holder.kill()
    with folder_lock(tmp_path):
        pass
