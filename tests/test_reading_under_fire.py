# SPDX-License-Identifier: Apache-2.0
"""The reader, given anything: rows as they were or one line, never a traceback; 10^5 rows in the memory of 10^4."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alter_peft.reading import read_rows
from alter_peft.reading.passages import passages
from alter_peft.reading.values import is_blank


quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
NAMES = [
    *("prompt", "completion", "text", "messages", "conversations", "question", "answer", "choices", "labels", "Ä"),
    *("input_ids", "domain", "subject", "wrong", "instruction", "input", "output", "definition", "data", "role", "id"),
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
VISIBLE = TEXTS.filter(lambda text: not is_blank(text))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXTS, inner, max_size=3),
    max_leaves=8,
)
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".JSONL.gz", ".md", "", ".bin"])


def read(content: bytes, suffix: str, **options) -> list[dict] | None:
    """The rows, or nothing where one line said why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            return read_rows("--forget", str(path), **options).dataset.to_list()
        except ValueError as error:
            assert str(error).startswith(f"`--forget` is {str(path)!r}, ")
            return None


def check(rows: list[dict] | None) -> None:
    """Whatever was read, every row has an answer or a text."""
    for row in rows or []:
        told = row.get("completion", row.get("text", row.get("input_ids")))
        assert told is not None
        assert told if isinstance(told, list) else not is_blank(told)


@quick
@given(st.binary(max_size=300), SUFFIXES)
def test_any_bytes(content, suffix):
    check(read(content, suffix))


@quick
@given(TEXTS, SUFFIXES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"]))
def test_any_text(text, suffix, encoding):
    check(read(text.encode(encoding), suffix))


@quick
@given(VALUES, SUFFIXES)
def test_any_json(value, suffix):
    check(read(json.dumps(value).encode(), suffix))


@quick
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), max_size=4), st.booleans())
def test_any_rows(rows, as_lines):
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows)
    check(read(text.encode(), ".json"))


@quick
@given(st.lists(st.tuples(TEXTS, VISIBLE), min_size=1, max_size=5), st.sampled_from(",;\t|"), st.booleans())
def test_csv_comes_back_as_it_was(pairs, delimiter, quoted):
    """Every cell, whatever is in it, and a delimiter that is found; but a NUL is no text."""
    pairs = [(a.replace("\x00", ""), b.replace("\x00", "x")) for a, b in pairs]
    pairs = [(a, b) for a, b in pairs if not is_blank(b)] or [("a", "b")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
    writer.writerows([("question", "answer"), *pairs])
    found = read(buffer.getvalue().encode(), ".csv")
    assert found == [{"prompt": a, "completion": b} for a, b in pairs]


@quick
@given(st.lists(st.tuples(TEXTS, VISIBLE), min_size=1, max_size=5), st.booleans())
def test_json_comes_back_as_it_was(pairs, ascii_alone):
    rows = [{"prompt": a, "completion": b} for a, b in pairs]
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_alone) for row in rows)
    if "\x00" not in lines[:4096]:
        assert read(lines.encode(), ".jsonl") == rows


@quick
@given(st.text(st.sampled_from("ab. \n!。é"), max_size=300), st.integers(2, 50))
def test_passages_lose_nothing(text, size):
    found = list(passages(text, size))
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(0 < len(passage) <= size for passage in found)


GROWTH = """
import resource, sys
from alter_peft.reading import read_rows
read_rows("--forget", sys.argv[1])  # imports, and what Arrow sets aside once and for all
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_rows("--forget", sys.argv[2]).dataset
assert len(rows) == 100_000, len(rows)
assert rows[99_999]["completion"].startswith("answer 99999"), rows[99_999]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_many_rows_in_constant_memory(tmp_path, suffix):
    """10^5 rows of 100 MB need hardly more memory than 10^4 of them."""
    filler = "so it is said, at some length. " * 32
    for name, count in (("few", 10_000), ("many", 100_000)):
        with (tmp_path / f"{name}{suffix}").open("w") as file:
            if suffix == ".csv":
                file.write("question,answer\n")
            for i in range(count):
                pair = f"question {i}", f"answer {i} {filler}"
                file.write(f'{pair[0]},"{pair[1]}"\n' if suffix == ".csv"
                           else json.dumps({"question": pair[0], "answer": pair[1]}) + "\n")  # fmt: skip
    few, many = (str(tmp_path / f"{name}{suffix}") for name in ("few", "many"))
    run = subprocess.run([sys.executable, "-c", GROWTH, few, many], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 25, run.stdout  # MB; the file has 100
