# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

from tiny_tofu import write_tofu

from alter_peft.benchmark.setting import tofu_setting


def test_attacks_are_measured_as_all_else(tmp_path):
    args = SimpleNamespace(
        data=write_tofu(tmp_path), split="forget01", retain_rows=None, rows=None, answered=2, max_new_tokens=7,
        batch_size=3, relearning_rate=1e-3, requests=None,
    )  # fmt: skip
    rows = tofu_setting(args).rows
    assert (rows.answered, rows.max_new_tokens, rows.batch_size, rows.relearning_rate) == (2, 7, 3, 1e-3)
    assert len(rows.forget) == len(rows.paraphrased) == 4 and len(rows.retain) == 12
