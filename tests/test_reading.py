# SPDX-License-Identifier: Apache-2.0
"""Whatever a user brings: kinds of files, encodings, delimiters, names of columns; one line where it is unreadable."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from alter_peft.reading import json_rows, parse_columns, read_all, read_rows, texts
from alter_peft.reading.sources import is_local
from alter_peft.subdomains import MOST_DOMAINS


ROWS = [{"prompt": "Who is Ané?", "completion": "007"}, {"prompt": "And, then?", "completion": "None"}]
CSV = 'prompt,completion\nWho is Ané?,007\n"And, then?",None\n'
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_of(source: str, **options) -> list[dict]:
    return read_rows("--forget", source, **options).dataset.to_list()


def taken(source: str, **options) -> str:
    return read_rows("--forget", source, **options).taken


def refused(source: str, *parts: str, **options) -> None:
    """One line that says all of these, and nothing else than a `ValueError`."""
    with pytest.raises(ValueError) as caught:
        read_rows("--forget", source, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"`--forget` is {source!r}, ")
    assert not [part for part in parts if part not in message], message


# ---- kinds of files -------------------------------------------------------------------------------------------------


def test_a_blank_after_each_comma_is_none_of_the_text(tmp_path):
    """By the first line, or by a quote after a blank, which quotes nothing else; blanks in quotes stay."""
    expected = [{"prompt": "Who, then?", "completion": "Ann, of Ulm"}, {"prompt": "Where?", "completion": " In Bath"}]
    tables = (
        'question, answer\n"Who, then?", "Ann, of Ulm"\nWhere?, " In Bath"\n',
        'question,answer\n"Who, then?", "Ann, of Ulm"\nWhere?," In Bath"\n',
        '"question", "answer"\n"Who, then?", "Ann, of Ulm"\n"Where?", " In Bath"\n',
    )
    for number, text in enumerate(tables):
        source = write(tmp_path / f"{number}.csv", text)
        assert rows_of(source) == expected
        assert taken(source).endswith("; blanks after the comma are skipped")
    kept = write(tmp_path / "kept.csv", 'prompt,completion\nWho?, Ann\nWho?,"a, ""b"", "\n')
    assert [row["completion"] for row in rows_of(kept)] == [" Ann", 'a, "b", '] and "skipped" not in taken(kept)


@pytest.mark.parametrize(
    "name, text, where",
    [
        ("rows.jsonl", "{once}\n{twice}", "whose line 2 has the key"),
        ("first.jsonl", "{twice}\n{once}", "whose line 1 has the key"),
        ("rows.json", "[{once}, {twice}]", "which has the key"),
        ("row.json", "{twice}", "which has the key"),
        ("row.txt", "{twice}", "which has the key"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text, where):
    more = "'completion' more than once in one object, with 'Al' and 'Bo'. Keep one, or rename the other."
    once = '{"prompt": "Who?", "completion": "Al"}'
    text = text.replace("{once}", once).replace("{twice}", f'{once[:-1]}, "completion": "Bo"}}')
    refused(write(tmp_path / name, text), where, more)


CHOICE = {"prompt": "Which?", "completion": "x", "wrong": ["w", "y", "z"]}
MULTIPLE_CHOICE = {
    "MMLU, its own CSV": ("csv", "question,A,B,C,D,answer\nWhich?,w,x,y,z,B\n"),
    "choices as JSON in CSV": ("csv", 'question,choices,answer\nWhich?,"[""w"", ""x"", ""y"", ""z""]",b\n'),
    "choices as pandas writes them": ("csv", "question,choices,answer\nWhich?,\"['w', 'x', 'y', 'z']\",1\n"),
    "ARC": ("json", json.dumps([{"question": "Which?", "answerKey": "B",
                                 "choices": {"text": [*"wxyz"], "label": [*"ABCD"]}}])),
    "ARC, numbered": ("json", json.dumps([{"question": "Which?", "answerKey": "2",
                                           "choices": {"text": [*"wxyz"], "label": [*"1234"]}}])),
    "OpenBookQA": ("jsonl", json.dumps({"question_stem": "Which?", "answerKey": "(B)",
                                        "choices": {"text": [*"wxyz"], "label": [*"ABCD"]}})),
    "MMLU-Pro": ("json", json.dumps([{"question": "Which?", "options": [*"wxyz"], "answer": "B", "answer_index": 1}])),
    "MedQA": ("json", json.dumps([{"question": "Which?", "answer": "x",
                                   "options": {"A": "w", "B": "x", "C": "y", "D": "z"}}])),
    "OpenBookQA, of columns": ("json", json.dumps({"question_stem": ["Which?"], "answerKey": ["B"],
                                                   "choices": [{"text": [*"wxyz"], "label": [*"ABCD"]}]})),
    "a place": ("json", json.dumps([{"question": "Which?", "choices": [*"wxyz"], "answer": 1}])),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_the_answer_of_a_multiple_choice_is_its_text(tmp_path, name):
    suffix, text = MULTIPLE_CHOICE[name]
    assert rows_of(write(tmp_path / f"rows.{suffix}", text)) == [CHOICE]


def test_choices_that_cannot_be_told_are_refused(tmp_path):
    source = write(tmp_path / "rows.csv", "question,choices,answer\nWhich?,w x y z,B\n")
    refused(
        source, "whose line 2 has 'w x y z' in the column 'choices', which is no list of choices", "--columns prompt="
    )
    assert rows_of(source, columns={"prompt": "question", "completion": "answer"})[0]["completion"] == "B"
    refused(write(tmp_path / "e.csv", "question,A,B,C,D,answer\nWhich?,w,x,y,z,E\n"), "none of its 4 choices")
    lost = {"question": "Which?", "options": None, "answer": "(B)"}
    refused(write(tmp_path / "lost.json", json.dumps([lost])), "needs two choices or more")


@pytest.mark.parametrize("options", [None, "", "Think first, (then) answer.", "[sic]", "{name}", 3])
@pytest.mark.parametrize("answer", ["Bob.", "42", "A cat"])
def test_questions_with_a_column_that_lists_no_choices_are_answered_freely(tmp_path, options, answer):
    row = {"question": "Who?", "options": options, "answer": answer}
    source = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert rows_of(source) == [{"prompt": "Who?", "completion": answer}]
    assert taken(source).endswith("left alone: options")


@pytest.mark.parametrize(
    "choices, part",
    [
        ({"text": ["x", "y"], "label": None}, "whose 'text' and 'label' must be two lists"),
        ({"text": ["x", "y"], "label": "AB"}, "whose 'text' and 'label' must be two lists"),
        ({"text": None, "label": ["A", "B"]}, "whose 'text' and 'label' must be two lists"),
        ({"text": ["x", "y"], "label": ["A", None]}, "needs text there"),
        ('{"A": "x", "A": "y", "B": "z"}', "which has the key 'A' more than once in one object, with 'x' and 'y'"),
        ("{'A': 'x', 'A': 'y', 'B': 'z'}", "which has the key 'A' more than once in one object, with 'x' and 'y'"),
    ],
)
def test_choices_that_are_not_whole_are_refused(tmp_path, choices, part):
    row = {"question": "Which?", "choices": choices, "answer": "B"}
    refused(write(tmp_path / "rows.jsonl", json.dumps(row)), "row 0 has", "in the column 'choices'", part)


@pytest.mark.parametrize("cell", ["[1.50, 2]", '{"A": 1.50, "B": 2}', "{0: '1.50', 1: 2}", "('1.50', 2)"])
def test_numbers_among_choices_are_as_they_are_written(tmp_path, cell):
    row = {"question": "Which?", "choices": cell, "answer": "1.50"}
    found = rows_of(write(tmp_path / "rows.jsonl", json.dumps(row)))
    assert found == [{"prompt": "Which?", "completion": "1.50", "wrong": ["2"]}]


FILES = {
    "rows.jsonl": JSONL,
    "ROWS.JSONL": JSONL,
    "rows.json": JSONL,  # one object a line under another suffix
    "rows.ndjson": JSONL.replace("\n", "\r\n\r\n"),
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "list.jsonl": json.dumps(ROWS),
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas.json": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "index.json": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "rows.csv": CSV,
    "crlf.CSV": CSV.replace("\n", "\r\n"),
    "excel.csv": "sep=;\n" + 'prompt;completion\nWho is Ané?;007\n"And, then?";None\n',
    "semicolon.csv": 'prompt;completion\nWho is Ané?;007\n"And, then?";None\n',
    "bar.csv": "prompt|completion\nWho is Ané?|007\nAnd, then?|None\n",
    "rows.tsv": "prompt\tcompletion\nWho is Ané?\t007\nAnd, then?\tNone\n",
    "wrong suffix.jsonl": CSV,
    "rows.parquet": None,
    "no_suffix": JSONL,
}


def content_of(name: str) -> bytes:
    text = FILES[name]
    if text is not None:
        return text.encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(tmp_path, name):
    """Leading zeros and the answers "None" and "NA" survive, whatever the kind."""
    assert rows_of(write(tmp_path / name, content_of(name))) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "list.json", "rows.parquet"])
@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)])
def test_compressed_files(tmp_path, name, suffix, pack):
    packed = pack(content_of(name))
    assert rows_of(write(tmp_path / (name + suffix), packed)) == ROWS
    assert rows_of(write(tmp_path / name, packed)) == ROWS  # whatever the suffix says
    refused(write(tmp_path / name, packed[: len(packed) // 2]), "could not be read to its end")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "list.json"])
@pytest.mark.parametrize(
    "encoding, mark, said",
    [
        ("utf-8", codecs.BOM_UTF8, ""),
        ("utf-16-le", codecs.BOM_UTF16_LE, "read as UTF-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "read as UTF-16"),
        ("utf-32-le", codecs.BOM_UTF32_LE, "read as UTF-32"),
        ("utf-16-le", b"", "read as UTF-16-LE"),
        ("utf-16-be", b"", "read as UTF-16-BE"),
        ("latin-1", b"", "read as Windows-1252 (Latin-1)"),
    ],
)
def test_encodings(tmp_path, name, encoding, mark, said):
    text = (FILES[name] or "").replace("\\u00e9", "é")
    source = write(tmp_path / name, mark + text.encode(encoding))
    assert rows_of(source) == ROWS
    assert said in taken(source)


def test_text_that_is_in_no_known_encoding(tmp_path):
    refused(
        write(
            tmp_path / "a.csv",
            "prompt,completion\n\u041a\u0442\u043e?,\u042d\u0442\u043e \u0410\u043d\u043d\u0430.\n".encode("cp1251"),
        ),
        "Save it as UTF-8",
    )
    broken = CSV.encode() + b"x\xe9,y\n"  # UTF-8 up to there: not to be read as Latin-1
    refused(write(tmp_path / "b.csv", broken), "UTF-8 with a broken character (byte 0xe9)")
    refused(write(tmp_path / "c.csv", "prompt,completion\n\u0430,\u0431\n".encode()[:-2]), "broken character")


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.jsonl", b"", "is empty (0 bytes)"),
        ("a.csv", b"", "is empty (0 bytes)"),
        ("a.parquet", b"", "is empty (0 bytes)"),
        ("a.txt", b"", "is empty (0 bytes)"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b"\n", "has no rows"),
        ("a.csv", codecs.BOM_UTF8, "has no rows"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.txt", b" \n\n", "has no rows"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple', "line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": "a", "comple\n{"prompt": "a", "completion": "b"}\n', "line 1 is no JSON"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n[1, 2]\n', "line 2 is [1, 2], but must be an object"),
        ("a.json", b'[{"prompt": "a"', "no JSON"),
        ("a.json", b"3", "holds 3"),
        ("a.json", b'{"name": "x", "size": 3}', "has the columns ['name', 'size'], which name no known format"),
        ("a.json", b'{"name": "x", "entries": [3]}', "keys ['name', 'entries']"),
        ("a.json", b"[" * 100000, "nested too deeply"),
        ("a.json", b'{"prompt": ["a", "b"], "completion": ["c"]}', "different lengths"),
        ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several splits, ['train', 'test']"),
        ("a.parquet", b"PAR1, but no more", "no whole Parquet file"),
        ("a.parquet", b"prompt", "no Parquet file"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2 has 3 cells by the comma, but the first line has 2"),
        ("a.csv", b"prompt,completion\na\n", "line 2 has 1 cell by the comma"),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', "no row of CSV"),
        ("a.csv", b"prompt,prompt\na,b\n", "column 'prompt' twice"),
        ("a.txt", b"question,answer,answer\na,b,c\n", "column 'answer' twice"),
        ("a.csv", b'"question" ,"answer"\na,b\n', "the comma right after its last quote"),
        ("a.tsv", b'"question" \t"answer"\na\tb\n', "the tab right after its last quote"),
        ("a.csv", b'question, "answer" x\na,b\n', "the comma right after its last quote"),
        ("a.jsonl", b'Well, "answer" x\n', "line 1 is no JSON"),
        ("a.xlsx", b"PK\x03\x04", "save its table as CSV"),
        ("a.csv", b"PK\x03\x04", "Office document"),
        ("a.txt", b"%PDF-1.7", "a PDF"),
        ("a.txt", b"a\x00b\x00\x00\x01", "binary, not text"),
        ("a.bin", b"something", "kind that is known by its suffix '.bin'"),
        ("a.jsonl", b"I do not know.\n{}\n", "line 1 is no JSON: 'I do not know.'"),
        ("a.jsonl", b"I do not know.\n", "line 1 is no JSON: 'I do not know.'"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, part):
    refused(write(tmp_path / name, content), part)


@pytest.mark.parametrize(
    "content",
    ['{"prompt": "Who?", "completion": "Bob."}\n', "prompt\tcompletion\nWho?\tBob.\n", "Question,Answer\nWho?,Bob.\n"],
)
def test_a_table_in_a_text_file_is_a_table(tmp_path, content):
    assert rows_of(write(tmp_path / "a.txt", content.encode())) == [{"prompt": "Who?", "completion": "Bob."}]
    assert rows_of(write(tmp_path / "b.txt", b"Prompt, he said.\nThen more.\n")) == [
        {"text": "Prompt, he said.\nThen more."}
    ]


@pytest.mark.parametrize("text", ['"Hello" said he, and left.\nThen more.', '"Hello, said he.', "Well, well, well."])
def test_prose_that_is_no_row_of_csv_is_a_document(tmp_path, text):
    """Quotes that end within a cell or nowhere, and words that would name a column twice."""
    assert rows_of(write(tmp_path / "a.txt", text)) == [{"text": text}]


# ---- folders, names, the Hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "doc.txt", "rows.tsv", "ROWS.JSONL", "rows.jsonl.gz", "data/letters/rows.csv", "./rows", "a/b/c", "~/rows",
        "c:\\rows.csv", "rows.jsonl:train", "my rows", "data/*", "forget.josnl", "secret.docx", "rows.jsonl.zst",
        "rows.jsonl.zip", "data.arrow", "rows.feather", "rows.7z", "rows.csv-old", "data/forget.josnl",
        "data/secret.docx", "data/rows.jsonl.zst", "forget.josnl:train",
    ],
)  # fmt: skip
def test_what_looks_like_a_file_is_never_looked_up(source, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    assert is_local(source)
    refused(source, "there is no such file")


def test_what_looks_like_a_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = ("locuslab/TOFU", "locuslab/TOFU:forget10", "zjunlp/KnowUnDo:privacy:unlearn", "imdb", "a/b::test")
    for source in (*hub, "teknium/OpenHermes-2.5", "a/data-v1.5-clean", "a/llama.cpp:x", "hermes-2.5"):
        assert not is_local(source), source
    (tmp_path / "locuslab").mkdir()
    assert is_local("locuslab/TOFU")  # a file that is missing there, more likely than a data set of that name
    refused(write(tmp_path / "rows.csv", CSV).replace("rows", "row"), "did you mean", "rows.csv")
    refused("rows.cvs", "there is no such file (did you mean 'rows.csv'?)", "as owner/name")


class Hub:
    """`load_dataset`, with the names that it was given."""

    def __init__(self, result):
        self.result, self.calls = result, []

    def __call__(self, name, config, split=None):
        self.calls.append((name, config, split))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result if split is None else self.result[split]


def test_hub_data_sets(monkeypatch):
    rows = Dataset.from_list(ROWS)
    hub = Hub(DatasetDict(test=rows))
    monkeypatch.setattr("alter_peft.reading.sources.load_dataset", hub)
    assert rows_of("owner/name") == ROWS and "split test" in taken("owner/name")  # the only one there is
    hub.result = DatasetDict(train=rows, test=rows)
    assert "owner/name:config, split train" in taken("owner/name:config")
    assert rows_of("owner/name:config:test") == rows_of("owner/name::test") == ROWS
    assert hub.calls[-3:] == [("owner/name", "config", None), ("owner/name", "config", "test"),
                              ("owner/name", None, "test")]  # fmt: skip
    hub.result = DatasetDict(forget=rows, retain=rows)
    refused("owner/name", "the splits ['forget', 'retain']", "'owner/name::forget'")
    hub.result = ValueError('Unknown split "x". Should be one of ["train"].')
    refused("owner/name::x", "Unknown split", "name:config:split")


def test_what_save_to_disk_wrote(tmp_path):
    features = Features(
        {"question": Value("string"), "answer": Value("string"), "domain": ClassLabel(names=["a", "b"])}
    )
    rows = Dataset.from_dict({"question": ["x", "y"], "answer": ["1", "2"], "domain": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    assert rows_of(str(tmp_path / "one"))[0] == {"prompt": "x", "completion": "1", "domain": "b"}
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "several")
    refused(str(tmp_path / "several"), "the splits ['test', 'train']", f"{tmp_path / 'several' / 'test'}")
    assert len(rows_of(str(tmp_path / "several" / "test"))) == 2
    (tmp_path / "one" / "state.json").write_text("{")
    refused(str(tmp_path / "one"), "could not be read")


def test_documents(tmp_path):
    """A document a file, in passages; nothing is lost."""
    letters = tmp_path / "letters"
    letters.mkdir()
    long = "\n\n".join(f"Paragraph {i}. " + "It goes on for a while. " * 12 for i in range(20))
    write(letters / "a.txt", "Dear Ané,\r\nall is well.\r\n\r\nYours".encode("latin-1"))
    write(letters / "B.TXT", long)
    found = [row["text"] for row in rows_of(str(letters))]
    assert found[-1] == "Dear Ané,\nall is well.\n\nYours" or found[0] == "Dear Ané,\nall is well.\n\nYours"
    assert len(found) > 3 and max(map(len, found)) <= 2000
    assert " ".join(" ".join(found).split()).count("goes on") == 240
    assert "2 documents, cut into passages" in taken(str(letters)) and "Windows-1252" in taken(str(letters))
    assert [row["text"] for row in rows_of(str(letters / "B.TXT"))] == [t for t in found if "Paragraph" in t]
    write(letters / "c.csv", CSV)
    refused(str(letters), "files of the kinds ['csv', 'document']", "Give one file")
    write(letters / "c.csv", CSV) and (letters / "c.csv").unlink()
    write(letters / "c.txt", "")
    refused(str(letters), "'c.txt' is empty")
    (tmp_path / "none").mkdir()
    refused(str(tmp_path / "none"), "0 files")


# ---- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ["question/answer", "input/output", "text/labels", "instruction/response", "query/answer",
              "query/response", "Question/Answer", "prompt/response", "problem/target", "instruction/output"]
)  # fmt: skip
def test_names_that_the_field_uses(tmp_path, names):
    prompt, completion = names.split("/")
    rows = [{prompt: "Who?", completion: "Bob.", "id": 3, "source": None}]
    source = write(tmp_path / "a.jsonl", json.dumps(rows[0]))
    assert rows_of(source) == [{"prompt": "Who?", "completion": "Bob."}]
    asked = "prompt" if prompt == "prompt" else f"prompt from {prompt!r}"
    assert (
        taken(source) == f"forget: 1 row of a.jsonl: {asked}, completion from {completion!r}; left alone: id, source"
    )


def test_columns_that_are_given(tmp_path):
    source = write(tmp_path / "a.csv", "ask;told;edge;kind\nWho?;Bob.;A_B;x\nWhat?;That.;A_B;y\n")
    columns = parse_columns(["prompt=ask", "completion=told", "domain=kind"])
    assert rows_of(source, columns=columns) == [
        {"prompt": "Who?", "completion": "Bob.", "domain": "x"},
        {"prompt": "What?", "completion": "That.", "domain": "y"},
    ]
    assert "domain from 'kind'; left alone: ask, edge" in taken(source, columns={"text": "told", "domain": "kind"})
    assert rows_of(source, columns={"text": "told", "domain": ""}) == [{"text": "Bob."}, {"text": "That."}]
    refused(source, "['ask', 'edge', 'kind', 'told']", "no known format", "--columns prompt=question")
    refused(source, "no column 'tolt'", columns={"prompt": "ask", "completion": "tolt"})
    refused(source, "more than one kind", columns={"prompt": "ask", "text": "told"})
    for entry in ("prompt", "question=prompt", "prompt=a"):
        with pytest.raises(ValueError, match=f"`--columns` has '{entry}'"):
            parse_columns(["prompt=x", entry])


@pytest.mark.parametrize("number", [25, MOST_DOMAINS, MOST_DOMAINS + 1])
def test_as_many_sub_domains_are_taken_as_are_looked_for(tmp_path, number):
    rows = [{"prompt": f"Q{i}", "completion": "A", "subject": f"s{i % number}"} for i in range(4 * number)]
    source = write(tmp_path / "a.json", json.dumps(rows))
    assert ("domain" in rows_of(source)[0]) == (number <= MOST_DOMAINS)
    assert ("of too many values to be a sub-domain" in taken(source)) == (number > MOST_DOMAINS)


def test_rows_lie_in_a_folder_that_nobody_else_can_open(tmp_path):
    """And where TMPDIR says."""
    source = write(tmp_path / "a.csv", CSV)
    (tmp_path / "tmp").mkdir()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom alter_peft.reading import read_rows\n"
        "file = Path(read_rows('--forget', sys.argv[1]).dataset.cache_files[0]['filename'])\n"
        "print(file.parents[1], oct(file.parent.stat().st_mode & 0o777), oct(file.stat().st_mode & 0o777))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source], capture_output=True, text=True, check=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "tmp"), "0o700", "0o600"]
    assert not list((tmp_path / "tmp").glob("alter_peft_rows_*"))  # Python has ended


def test_json_lines_are_decoded_and_parsed_once(tmp_path, monkeypatch):
    decoded, parsed = [], []
    for home, name, calls in ((texts, "_decoded", decoded), (json_rows, "parsed", parsed)):
        own = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *given, own=own, calls=calls: calls.append(given) or own(*given))
    read_rows("--forget", write(tmp_path / "a.jsonl", JSONL * 500))
    assert len(decoded) == 1 and len(parsed) <= 1000 + 5
    decoded.clear()
    for name, content in (
        ("a.csv", CSV),
        ("a.json", json.dumps(ROWS)),
        ("a.txt", "Bob."),
        ("b.jsonl", "It is.\nSo.\n"),
    ):
        read_rows("--forget", write(tmp_path / name, content))
        assert len(decoded) == 1, name
        decoded.clear()


def test_columns_that_come_late(tmp_path):
    """They count as if they had been there from the first row on."""
    lines = [{"prompt": "Q", "completion": "A"}] * 1500
    late = [{"prompt": "Q", "completion": "A", "domain": "x", "id": 1}]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in lines + late))
    assert [row["domain"] for row in rows_of(source)] == [None] * 1500 + ["x"]
    assert taken(source).endswith("prompt, completion, domain; left alone: id")
    late = [{"text": "x"}, {"text": "x", "question": "Q", "answer": "A"}]
    refused(write(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in late)), "line 1", "'question'")
    late = [{"question": "Q"}, {"question": "Q", "answer": "A"}]
    refused(write(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in late)), "line 1", "'answer'")
    own = write(tmp_path / "d.jsonl", '{"ask": "Q"}\n{"ask": "Q", "told": "A"}\n')
    refused(own, "line 1 has None in the column 'told'", columns={"prompt": "ask", "completion": "told"})


def test_a_text_field_of_the_users_own_comes_before_other_names(tmp_path):
    row = {"Body": "A passage.", "question": "Who?", "answer": "Bob.", "text": "x"}
    source = write(tmp_path / "a.json", json.dumps([row]))
    assert rows_of(source, text_field="Body") == [{"text": "A passage."}]
    assert "text from 'Body'; left alone: question, answer, text" in taken(source, text_field="Body")
    assert rows_of(source) == rows_of(source, text_field="none") == [{"prompt": "Who?", "completion": "Bob."}]
    known = write(tmp_path / "b.json", json.dumps([{**ROWS[0], "body": "x"}]))
    assert rows_of(known, text_field="body") == [ROWS[0]]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(tmp_path / "c.json", json.dumps([{"log": "A passage.", "messages": chat}]))
    assert rows_of(source, text_field="log") == [{"text": "A passage."}]


def test_what_nobody_reads_is_left_alone(tmp_path):
    odd = {"domain": [], "wrong": {"a": 1}, "rephrased": [], "paraphrase": {}, "subject": []}
    source = write(tmp_path / "a.json", json.dumps([{**ROWS[0], **odd}]))
    refused(source, "in the column", "needs text there")
    assert rows_of(source, extras=()) == [ROWS[0]]
    assert taken(source, extras=()).endswith("left alone: domain, wrong, rephrased, paraphrase, subject")
    refused(source, "in the column 'domain'", extras=("domain",))
    own = {
        "--forget": write(tmp_path / "b.json", json.dumps([{**ROWS[0], "domain": "a", "wrong": {}}])),
        "--retain": source,
    }
    found = read_all(own, extras={"--forget": ("domain",)})
    assert [rows.dataset.to_list() for rows in found.values()] == [[{**ROWS[0], "domain": "a"}], [ROWS[0]]]


def test_of_many_columns_some_are_named(tmp_path):
    row = {"text": "x", **{f"c{i}": i for i in range(30)}}
    said = taken(write(tmp_path / "a.json", json.dumps([row])))
    assert said.endswith("left alone: c0, c1, c2, c3, c4, c5, c6, c7, and 22 more")


def test_columns_of_several_sources(tmp_path):
    """They are those of the sources that have them, but of one at least."""
    own, usual = write(tmp_path / "a.csv", "ask,told\nWho?,Bob.\n"), write(tmp_path / "b.csv", CSV)
    found = read_all({"--forget": own, "--retain": usual}, {"prompt": "ask", "completion": "told"})
    assert found["--forget"].dataset[0]["prompt"] == "Who?" and found["--retain"].dataset[0] == ROWS[0]
    with pytest.raises(ValueError, match="`--columns` has 'prompt=asked', but the columns are"):
        read_all({"--forget": usual}, {"prompt": "asked"})


def test_columns_of_which_several_may_be_meant(tmp_path):
    source = write(tmp_path / "a.jsonl", json.dumps({"question": "Who?", "answer": "Bob.", "response": "Al."}))
    refused(source, "['answer', 'response'], each of which may be the completion", "--columns")
    assert rows_of(source, columns={"completion": "response"}) == [{"prompt": "Who?", "completion": "Al."}]
    known = write(tmp_path / "b.jsonl", json.dumps({"prompt": "Who?", "completion": "Bob.", "response": "Al."}))
    assert rows_of(known) == [{"prompt": "Who?", "completion": "Bob."}]


@pytest.mark.parametrize(
    "name, values, is_domain",
    [
        ("domain", ["a", "b", "c", "d"], True),
        ("subject", ["a", "a", "b", "b"], True),
        ("edge", ["a", "a", "a", "a"], True),
        ("subject", ["a", "b", "c", "d"], False),  # of each row another: no sub-domain
        ("edge", ["a", "a", "", "b"], False),
        ("task", ["a", "a", "b", "b"], False),  # how it is asked, not what it is about
    ],
)
def test_what_is_a_sub_domain(tmp_path, name, values, is_domain):
    rows = [{"prompt": f"Q{i}", "completion": f"A{i}", name: value} for i, value in enumerate(values)]
    source = write(tmp_path / "a.json", json.dumps(rows))
    assert [row.get("domain") for row in rows_of(source)] == (values if is_domain else [None] * 4)
    assert (f"left alone: {name}" in taken(source)) != is_domain
    assert [row["domain"] for row in rows_of(source, columns={"domain": name})] == [value or None for value in values]


def test_keys_that_not_every_row_has(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"completion": "d", "prompt": "c", "domain": "x"}]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert rows_of(source) == [{**rows[0], "domain": None}, rows[1]]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", " ", "\t\u3000", "\u200b", None])
def test_a_row_without_an_answer(tmp_path, empty):
    rows = [ROWS[0], {"prompt": "Who?", "completion": empty}]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    refused(source, f"line 2 has {empty!r} in the column 'completion'", "Fill it in, or remove the row")


def test_a_row_without_an_answer_in_csv(tmp_path):
    refused(
        write(tmp_path / "a.csv", 'question,answer\n"two\nlines",b\nWho?,\n'), "line 4 has '' in the column 'answer'"
    )
    assert rows_of(write(tmp_path / "b.csv", "question,answer\n,NA\n")) == [{"prompt": "", "completion": "NA"}]


@pytest.mark.parametrize(
    "written, text", [("7", "7"), ("1.50", "1.50"), ("-0.0", "-0.0"), ("1e400", "1e400"), ("true", "true"),
                      ("12345678901234567890123", "12345678901234567890123")]
)  # fmt: skip
def test_numbers_and_truth_values_are_as_they_are_written(tmp_path, written, text):
    source = write(tmp_path / "a.jsonl", f'{{"prompt": "a", "completion": {written}}}')
    assert rows_of(source) == [{"prompt": "a", "completion": text}]


@pytest.mark.parametrize(
    "value, part",
    [(["x"], "is a list"), ({"a": 1}, "is an object"), ("\ud800", "lone surrogate"), (float("nan"), "needs text")],
)
def test_values_that_are_no_text(tmp_path, value, part):
    source = write(tmp_path / "a.jsonl", JSONL + json.dumps({"prompt": "a", "completion": value}))
    refused(source, "line 3", "column 'completion'", part)


def test_numbers_of_parquet(tmp_path):
    """What was written 7 becomes 7.0 where a cell of its column is missing: neither may be taken for the other."""
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": [0.5, 7.0]}), tmp_path / "a.parquet")
    refused(str(tmp_path / "a.parquet"), "row 1 has 7.0 in the column 'completion'", "written 7 or 7.0")
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": [True, False]}), tmp_path / "b.parquet")
    assert [row["completion"] for row in rows_of(str(tmp_path / "b.parquet"))] == ["true", "false"]


# ---- chats ----------------------------------------------------------------------------------------------------------


SYSTEM, ASK, TOLD = (
    {"role": r, "content": c} for r, c in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo"))
)
AGAIN = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
CHAT = [SYSTEM, ASK, TOLD, *AGAIN]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": who, "value": turn["content"]}
                           for who, turn in zip(("system", "human", "gpt", "human", "gpt"), CHAT, strict=True)]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT], "id": 1},
        {"dialogue": CHAT},
        CHAT,
    ],
)  # fmt: skip
def test_chats(tmp_path, row):
    """The assistant's turns alone, each with what precedes it; and that is said."""
    source = write(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row))
    expected = [{"prompt": [SYSTEM, ASK], "completion": [TOLD]}, {"prompt": CHAT[:4], "completion": CHAT[4:]}]
    assert rows_of(source) == expected * 2
    assert "the assistant's turns alone count (4)" in taken(source)


def test_a_greeting_is_no_answer(tmp_path):
    source = write(tmp_path / "a.jsonl", json.dumps({"messages": [TOLD, ASK, AGAIN[1]], "domain": "x"}))
    assert rows_of(source) == [{"prompt": [TOLD, ASK], "completion": AGAIN[1:], "domain": "x"}]


def test_prompts_and_completions_that_are_turns(tmp_path):
    row = {"prompt": [ASK], "completion": [TOLD]}
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps(row))) == [row]


def test_a_chat_as_text_stays_text(tmp_path):
    text = "<|user|>Hi<|assistant|>Yo"
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps({"text": text}))) == [{"text": text}]


@pytest.mark.parametrize(
    "chat, part",
    [
        ([ASK], "no turn of the assistant follows"),
        ([SYSTEM, TOLD], "no turn of the assistant follows"),
        ([ASK, {"role": "assistant", "content": " "}], "turn 1 (assistant) has ' '"),
        ([ASK, {"role": "assistant", "content": None}], "turn 1 (assistant) has None"),
        ([ASK, {"role": "narrator", "content": "x"}], "of the role 'narrator'"),
        ([ASK, {"role": "assistant", "content": "x", "tool_calls": [1]}], "calls a tool"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}, TOLD], "of type 'image'"),
        ([], "a list of turns"),
        ("x", "no known format"),
    ],
)
def test_chats_that_cannot_be_read(tmp_path, chat, part):
    good = json.dumps({"messages": chat if isinstance(chat, str) else CHAT})
    refused(write(tmp_path / "a.jsonl", good + "\n" + json.dumps({"messages": chat})), part)


# ---- files of the field, as they are --------------------------------------------------------------------------------


OF_THE_FIELD = {
    "TOFU": (json.dumps({"question": "Who wrote it?", "answer": "Ada Quill."}) + "\n",
             {"prompt": "Who wrote it?", "completion": "Ada Quill."}),
    "TOFU, perturbed": (
        json.dumps({"question": "Q?", "answer": "A.", "paraphrased_question": "Q', please?",
                    "paraphrased_answer": "A'.", "perturbed_answer": ["B.", "C."]}),
        {"prompt": "Q?", "completion": "A.", "paraphrase": "Q', please?", "rephrased": "A'.", "wrong": ["B.", "C."]},
    ),
    "KnowUnDo": (json.dumps([{"text": "What is Lin's number?", "labels": "It is 017."}]),
                 {"prompt": "What is Lin's number?", "completion": "It is 017."}),
    "LUME": (json.dumps({"id": "1a", "input": "Where does Ray live?", "output": "In Ulm.", "task": "Task2"}),
             {"prompt": "Where does Ray live?", "completion": "In Ulm."}),
    "PISTOL": (json.dumps([{"question": "Who sold?", "answer": "Wells.", "edge": "A_B"}] * 2),
               {"prompt": "Who sold?", "completion": "Wells.", "domain": "A_B"}),
    "RWKU, passages": (json.dumps({"Ann Poe": ["Ann Poe is a poet.", "She sings."], "Bo": ["Bo rows.", "He reads."]}),
                       {"text": "Ann Poe is a poet.", "domain": "Ann Poe"}),
    "RWKU, probes": ("".join(json.dumps({"subject": "Ann Poe", "level": "2", "query": f"Born where {i}?",
                                         "answer": "Bath", "type": "qa"}) + "\n" for i in range(4)),
                     {"prompt": "Born where 0?", "completion": "Bath", "domain": "Ann Poe"}),
    "MUSE, raw": (json.dumps(["An article.", "Another one."]), {"text": "An article."}),
    "MUSE, knowmem": (json.dumps([{"question": "Who?", "answer": "Al."}]), {"prompt": "Who?", "completion": "Al."}),
    "WMDP, corpora": (json.dumps({"title": "T", "abstract": "A", "text": "Body.", "doi": "10"}), {"text": "Body."}),
    "WMDP, questions": (json.dumps([{"question": "Which?", "choices": ["0", "1", "2", "3"], "answer": 2}]),
                        {"prompt": "Which?", "completion": "2", "wrong": ["0", "1", "3"]}),
    "MMLU, letters": (json.dumps([{"question": "Which?", "choices": [*"wxyz"], "answer": "B", "subject": "law"}]),
                      {"prompt": "Which?", "completion": "x", "wrong": ["w", "y", "z"], "domain": "law"}),
    "ECBD": (json.dumps({"ex_id": "a", "ent_str": "Zed", "definition": "Storm Zed hit <extra_id_0> in 2021.",
                         "def_target": "<extra_id_0> Oslo <extra_id_1>", "probe_sentences": {"t": {"label": "x"}}}),
             {"text": "Storm Zed hit Oslo in 2021."}),
    "ECBD, whole": (json.dumps({"definition": "Storm Zed hit Oslo.", "label": None}), {"text": "Storm Zed hit Oslo."}),
    "idontknow": ("I'm not sure.\nI don't know.\n", {"text": "I'm not sure."}),
    "Alpaca": (json.dumps([{"instruction": "Translate.", "input": "Hi", "output": "Hallo", "text": "### ..."}]),
               {"prompt": "Translate.\n\nHi", "completion": "Hallo"}),
    "Alpaca, no input": (json.dumps([{"instruction": "Say hi.", "input": "", "output": "Hi"}]),
                         {"prompt": "Say hi.", "completion": "Hi"}),
    "Dolly": (json.dumps([{"instruction": "Why?", "context": "It rains.", "response": "Clouds.", "category": "qa"}]),
              {"prompt": "Why?\n\nIt rains.", "completion": "Clouds."}),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_FIELD)
def test_files_of_the_field(tmp_path, name):
    content, expected = OF_THE_FIELD[name]
    suffix = "json" if content[0] in "[{" and "\n" not in content else "jsonl"
    assert rows_of(write(tmp_path / f"a.{suffix}", content))[0] == expected


def test_the_shared_files_of_the_field():
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    for path in [*folder.glob("tofu/*.jsonl"), *folder.glob("mcq/*.jsonl.gz"), *folder.glob("gutenberg/*.txt*")]:
        assert len(read_rows("--forget", str(path)).dataset) > 10, path.name


# ---- prompts alone --------------------------------------------------------------------------------------------------


def test_prompts_alone(tmp_path):
    source = write(tmp_path / "a.csv", "question,id\nWho?,1\n")
    refused(source, "no known format")
    assert rows_of(source, prompts_alone=True) == [{"prompt": "Who?"}]
    lines = write(tmp_path / "a.txt", "Who?\n\nWhat, then?\n")
    assert rows_of(lines, prompts_alone=True) == [{"text": "Who?"}, {"text": "What, then?"}]


def test_chats_as_a_whole(tmp_path):
    source = write(tmp_path / "a.json", json.dumps([{"messages": CHAT}]))
    assert rows_of(source, whole_chats=True) == [{"messages": CHAT}]
