# SPDX-License-Identifier: Apache-2.0
"""The same data through `unlearn`, `evaluate` and `generate`: other people's files as they are, or one line."""

from __future__ import annotations

import json
import socket

import pytest
from conftest import make_llama

from alter_peft.cli import main
from alter_peft.evaluation import Key, Result


FORGET = "question;answer;edge;id\nWhere does Zoé live?;In Paris, near the bridge.;A_B;1\nWho bakes, then?;007;C_D;2\n"
FORGET += "Where does Al live?;None;A_B;3\nWho bakes it?;With rye.;C_D;4\n"
RETAIN = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"What is {i}?"},
                        {"role": "assistant", "content": f"It is {i}."}]} for i in range(4)]  # fmt: skip
QUICK = ["--num_train_epochs", "1", "--report_to", "none", "--logging_steps", "1", "--use_cpu", "--bf16", "false"]
QUICK += ["--save_strategy", "no", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", "--force"]


@pytest.fixture
def place(tokenizer, tmp_path, monkeypatch):
    """A tiny model and data of other people's on disk; no socket is opened."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "FORGET.CSV").write_bytes(FORGET.encode("latin-1"))
    (tmp_path / "chats.json").write_text(json.dumps(RETAIN))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("Dear Ann,\n\nall is well here.")
    (tmp_path / "letters" / "b.txt").write_text("Dear Bob,\nit rains.")

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def unlearn(place, *more: str) -> list[str]:
    given = {"--model": "base", "--forget": "FORGET.CSV", "--retain": "chats.json", "--output_dir": "out"}
    given = {flag: name for flag, name in given.items() if flag not in more}
    return ["unlearn", *(text for flag, name in given.items() for text in (flag, str(place / name))), *QUICK, *more]


def test_other_peoples_files_through_every_command(place, capsys):
    main(unlearn(place, "--calibration", str(place / "letters"), "--top_k", "4"))
    out = capsys.readouterr().out
    assert (
        "forget: 4 rows of FORGET.CSV: prompt from 'question', completion from 'answer', domain from 'edge'; left "
        "alone: id; read as Windows-1252 (Latin-1); save it as UTF-8 if letters are wrong; delimited by semicolon\n"
    ) in out
    assert "retain: 4 rows of chats.json: messages; the assistant's turns alone count (4)" in out
    assert "calibration: 2 passages of letters/: text; 2 documents, cut into passages" in out
    assert "sub-domain A_B: 2 rows to forget" in out and "sub-domain C_D: 2 rows to forget" in out

    sources = {"forget": "FORGET.CSV", "chats": "chats.json", "letters": "letters"}
    sets = [f"{name}={place / file}" for name, file in sources.items()]
    base = ["--model", str(place / "base"), "--adapter", str(place / "out")]
    output = ["--output_file", str(place / "scores.json"), "--metrics", "probability", "exact_memorization"]
    main(["evaluate", *base, *output, "--sets", *sets, "--forget", "forget"])
    said = capsys.readouterr()
    assert "sets forget: 4 rows of FORGET.CSV" in said.err and "forget/probability" in said.out
    scores = Result.load(place / "scores.json").scores
    assert [len(scores[Key(name, "probability")].rows or []) for name in sources] == [4, 4, 2]

    for file, count in (("FORGET.CSV", 4), ("chats.json", 4), ("letters/b.txt", 2)):
        main(["generate", *base, "--prompts", str(place / file), "--max_new_tokens", "2"])
        assert capsys.readouterr().out.count("prompt:  ") == count


def test_columns_of_the_users_own(place, capsys):
    (place / "log.tsv").write_text("asked\ttold\tcustomer\nWho?\tBob.\tx\nWhere?\tHere.\tx\n")
    columns = ["--columns", "prompt=asked", "completion=told", "domain=customer"]
    retain = place / "odd.jsonl"  # of which nobody reads more than questions and answers
    retain.write_text('{"prompt": "When?", "completion": "Now.", "domain": [], "wrong": {}}\n' * 2)
    main(unlearn(place, *columns, "--forget", str(place / "log.tsv"), "--retain", str(retain)))
    out = capsys.readouterr().out
    assert "forget: 2 rows of log.tsv: prompt from 'asked', completion from 'told', domain from 'customer'" in out
    assert "retain: 2 rows of odd.jsonl: prompt, completion; left alone: domain, wrong\n" in out
    assert "sub-domain x: 2 rows to forget" in out


@pytest.mark.parametrize(
    "content, name, parts",
    [
        ("question,answer\nWho?,Bob.\nWhere?,\n", "a.csv", ("line 3 has '' in the column 'answer'", "Fill it in")),
        ("", "a.jsonl", ("is empty (0 bytes)",)),
        ("q,a\nWho?,Bob.\n", "a.csv", ("['a', 'q']", "`--columns`")),
        ('{"prompt": "a", "completion": ["b"]}\n' * 2, "a.jsonl", ("line 1 has ['b'] in the column 'completion'",)),
        (None, "a.jsonl.gz", ("there is no such file",)),
        (None, "A.TXT", ("there is no such file",)),
    ],
)
def test_one_line_says_what_is_wrong(place, capsys, content, name, parts):
    """By every command, of its own flag, with status 2."""
    path = place / "given" / name
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    model = ["--model", str(place / "base")]
    commands = {
        "--forget": unlearn(place, "--forget", str(path)),
        "--retain": unlearn(place, "--retain", str(path)),
        "--sets a": ["evaluate", *model, "--output_file", str(place / "x.json"), "--sets", f"a={path}"],
        "--prompts": ["generate", *model, "--adapter", str(place / "none"), "--prompts", str(path)],
    }
    if "answer" in str(content) or "completion" in str(content):
        del commands["--prompts"]  # prompts need no answers
    for flag, command in commands.items():
        with pytest.raises(SystemExit) as ended:
            main(command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1, (flag, said)
        assert f"error: `{flag}` is {str(path)!r}, " in said and not [part for part in parts if part not in said]


def test_what_a_trainer_refuses_speaks_of_flags(place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(unlearn(place, "--retain", str(place / "FORGET.CSV")))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "`--retain` holds 4 of the 4 rows of `--forget`" in said
