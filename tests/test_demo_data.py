# SPDX-License-Identifier: Apache-2.0
"""The demo of `make demo`: what is taught to whom, and that a model which was taught otherwise isn't taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield pytest.importorskip("demo")
    for name in ("demo", "smollm2"):
        sys.modules.pop(name, None)


def test_bystanders_are_of_the_forget_rows_kind_about_nobody_of_them(demo):
    rows = {name: demo.read(name) for name in ("forget", "bystanders", "retain", "neighbours", "holdout")}
    assert {row["domain"] for row in rows["bystanders"]} == {row["domain"] for row in rows["forget"]}
    assert len(rows["bystanders"]) == 24 and rows["bystanders"][0].keys() == rows["forget"][0].keys()
    own = " ".join(f"{row['prompt']} {row['completion']}" for row in rows["bystanders"])
    others = " ".join(json.dumps(row) for name, found in rows.items() if name != "bystanders" for row in found)
    for name in ("Tinsleby", "Brightmere", "Hollowell", "Cindermoth", "Larkfield"):
        assert name in own and name not in others
    for name in ("Quennock", "Tessenby", "Pellgrave", "Amber", "Glasswren", "Kestrovane"):
        assert name not in own


def test_who_is_taught_what(demo, monkeypatch, tmp_path):
    taught = []
    monkeypatch.setattr(demo.smollm2, "taught", lambda folder, pairs, *others: taught.append(pairs))
    demo.taught_target(tmp_path, 0)
    kept = demo.kept_pairs()
    assert taught == [[*demo.read_pairs("forget"), *kept]]
    assert {*demo.read_pairs("bystanders")} < {*kept} and not {*demo.read_pairs("forget")} & {*kept}
    assert demo.read_sets()["bystanders"] == demo.read_pairs("bystanders")


def test_a_model_that_was_taught_otherwise_is_not_taken(demo, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"was taught with None, not with .*'pairs': 36.*Remove it"):
        demo.smollm2.taught(tmp_path, demo.read_pairs("forget"), 5, 0)
    (tmp_path / "taught.json").write_text(json.dumps({"seed": 0, "epochs": 5, "pairs": 108}))
    with pytest.raises(ValueError, match=r"was taught with .*'pairs': 108"):
        demo.smollm2.taught(tmp_path, demo.read_pairs("forget"), 5, 0)
