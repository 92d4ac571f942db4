# SPDX-License-Identifier: Apache-2.0
"""The command line without rows to retain, and without rows that were never seen."""

from __future__ import annotations

import re

import pytest
from conftest import make_llama
from test_cli import FORGET, QUICK, RETAIN, write_rows

from alter_peft.cli import main


@pytest.fixture
def given(tokenizer, tmp_path, monkeypatch):
    """Flags of a run of two steps, but for what is retained."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    forget = write_rows(tmp_path / "forget.jsonl", FORGET)
    own = ["--model", str(tmp_path / "base"), "--forget", forget, "--output_dir", str(tmp_path / "out")]
    return ["unlearn", *own, *QUICK]


def test_retain_auto(given, tmp_path, capsys):
    main([*given, "--retain", "auto"])
    assert "rows of general text\n" in capsys.readouterr().out
    corpus = write_rows(tmp_path / "corpus.jsonl", [*RETAIN, *FORGET, {"prompt": "Who bakes?", "completion": " Bob."}])
    main([*given, "--retain", "auto", "--corpus", corpus])
    out = capsys.readouterr().out
    assert "--retain: 64 rows of general text, and 3 of --corpus like the rows to forget\n" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "`--retain` is missing: without rows to keep, .* or `--retain auto`: .* suffers"),
        (["--retain", "r.jsonl", "--corpus", "c"], "`--corpus` is 'c', but rows are taken of it with `--retain auto`"),
        (["--retain", "auto", "--corpus", "nowhere.jsonl"], "`--corpus` is 'nowhere.jsonl', "),
    ],
)
def test_what_is_missing_is_said_in_one_line(given, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        main([*given, *more])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_without_calibration_the_line_says_what_is_lost(given, tmp_path, caplog):
    retain = ["--retain", write_rows(tmp_path / "retain.jsonl", RETAIN)]
    main([*given, *retain])
    said = [record.getMessage() for record in caplog.records if "--calibration" in record.getMessage()]
    assert len(said) == 1 and "may be forgotten too little or too much" in said[0] and "\n" not in said[0]
