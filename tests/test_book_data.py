# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import pytest
from trainer_setup import make_trainer
from transformers import ByT5Tokenizer

from alter_peft.evaluation import Pair, encode_pair, read_books
from alter_peft.evaluation.tasks.book_data import cut, read_book


DATA = Path(__file__).parents[1] / "examples" / "benchmark_data"
NAMES = ["Alice", "Bob", "Carl", "Dora", "Eve", "Fay"]
WORDS = ["bridge", "bread", "honey", "morning", "project", "colour", "budget", "old", "near", "seven", "bakes"]


def story(words: int, start: int = 0) -> str:
    """Sentences that never repeat, in wrapped lines and paragraphs."""
    text = []
    for i in range(start, start + words):
        text.append(f"{NAMES[i % 6]}{i}" if i % 7 == 0 else WORDS[(i * i + i // 5) % 11])
        text.append("\n\n" if i % 40 == 39 else "\n" if i % 9 == 8 else " ")
    return "".join(text)


@pytest.fixture
def books(tmp_path) -> dict[str, Path]:
    paths = {}
    for name, words, start in (("hyde", 300, 0), ("holmes", 160, 1000), ("dorian", 160, 2000), ("later", 160, 3000)):
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text(story(words, start), encoding="utf-8")
    return paths


# ---- read_book ------------------------------------------------------------------------------------------------------


def test_lines_are_joined_and_paragraphs_kept(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(
        "\ufeffTHE DOOR\r\n\r\n\r\nMr. Utterson was a man\r\n  of  few words.\r\n \r\nHe café.\r\n".encode()
    )
    assert read_book(path) == "THE DOOR\n\nMr. Utterson was a man of few words.\n\nHe café."


def test_a_gzipped_book_is_the_same(books):
    packed = books["hyde"].with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(books["hyde"].read_bytes()))
    assert read_book(packed) == read_book(str(books["hyde"]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "no book at '.*none.txt'"),
        ("latin.txt", "café".encode("latin-1"), "latin.txt' is no text in UTF-8"),
        ("plain.txt.gz", b"not packed", "plain.txt.gz' is no text in UTF-8"),
        ("empty.txt", b" \n\n \n", "empty.txt' has no text"),
    ],
)
def test_a_book_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_book(tmp_path / name)


# ---- cut ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 20, 64])
def test_pieces_are_the_text_in_tokens_of_their_own(tokenizer, books, length):
    text = read_book(books["hyde"])
    pieces = cut(text, tokenizer, length)
    joined = "".join(pieces)
    assert text.startswith(joined) and len(pieces) > 5
    whole = tokenizer(joined)["input_ids"]
    assert [token for piece in pieces for token in tokenizer(piece)["input_ids"]] == whole
    sizes = [len(tokenizer(piece)["input_ids"]) for piece in pieces]
    assert max(sizes) <= length and sum(sizes) / len(sizes) > length - 8
    assert len(tokenizer(text)["input_ids"]) - len(whole) < length
    assert all(piece[0].isspace() and not piece[-1].isspace() for piece in pieces[1:])


def test_a_word_longer_than_a_piece(tokenizer):
    with pytest.raises(ValueError, match=r"`length` is 4, but a word after ' Qqxzjvwk.*' has more tokens"):
        cut("the bread " + "Qqxzjvwkqjzxvkwq" * 2 + " the bread", tokenizer, 4)


def test_a_tokenizer_without_offsets():
    with pytest.raises(ValueError, match="`tokenizer` is a ByT5Tokenizer, but cutting needs a fast one"):
        cut("a b c", ByT5Tokenizer(), 2)


# ---- read_books -----------------------------------------------------------------------------------------------------


def text_of(passages) -> str:
    return "".join(passage.prompt + passage.completion for passage in passages)


def test_every_third_passage_is_held_out(tokenizer, books):
    data = read_books(tokenizer, books["hyde"], [books["holmes"], books["dorian"]], length=20)
    assert data.name == "hyde" and data.length == 20
    forget, holdout, calibration = iter(data.forget), iter(data.holdout), iter(data.calibration)
    turns = [forget, forget, holdout, forget, forget, calibration] * 9
    passages = [next(turn, None) for turn in turns]
    assert None in passages[18:] and not any(passages[passages.index(None) :])
    assert read_book(books["hyde"]).startswith(text_of(passages[: passages.index(None)]))


def test_retained_passages_come_from_every_book(tokenizer, books):
    data = read_books(tokenizer, books["hyde"], [books["holmes"], books["dorian"]], length=20)
    holmes, dorian = read_book(books["holmes"]), read_book(books["dorian"])
    of_holmes = [passage for passage in data.retain if text_of([passage]) in holmes]
    of_dorian = [passage for passage in data.retain if text_of([passage]) in dorian]
    assert of_holmes + of_dorian == data.retain
    assert holmes.startswith(text_of(of_holmes)) and dorian.startswith(text_of(of_dorian))
    few = read_books(tokenizer, books["hyde"], [books["holmes"], books["dorian"]], length=20, passages=5)
    assert few.retain == of_holmes[:3] + of_dorian[:2]
    assert few.forget == data.forget[:5]
    assert (few.holdout, few.calibration) == (data.holdout[:5], data.calibration[:5])


def test_another_book_may_be_held_out(tokenizer, books):
    data = read_books(tokenizer, books["hyde"], [books["holmes"]], holdout=books["later"], length=20)
    assert read_book(books["hyde"]).startswith(text_of(data.forget))
    assert len(data.forget) > len(read_books(tokenizer, books["hyde"], [books["holmes"]], length=20).forget)
    later = read_book(books["later"])
    assert all(text_of([passage]) in later for passage in data.holdout + data.calibration)
    assert not {*data.holdout} & {*data.calibration}


def test_questions_stand_behind_the_shots(tokenizer, books, tmp_path):
    for name, rows in {
        "shots": [("Who bakes?", "Bob"), ("Where?", "Paris")], "hyde": [("Who?", "Hyde"), ("What?", "A door")]
    }.items():  # fmt: skip
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = {"forget_questions": tmp_path / "hyde.jsonl", "shots": tmp_path / "shots.jsonl"}
    data = read_books(tokenizer, books["hyde"], [books["holmes"]], length=20, **files)
    shots = "Question: Who bakes?\nAnswer: Bob\n\nQuestion: Where?\nAnswer: Paris\n\n"
    assert data.forget_questions == [
        Pair(shots + "Question: Who?\nAnswer: ", "Hyde"),
        Pair(shots + "Question: What?\nAnswer: ", "A door"),
    ]
    assert data.retain_questions == []


@pytest.mark.parametrize(
    "line, message",
    [
        (None, "no questions at '.*q.jsonl'"),
        ("", "q.jsonl' has no questions"),
        ("{", "Line 1 of '.*q.jsonl' is no JSON"),
        ('{"question": "Who?", "answer": "Hyde"}\n{"question": "Who?"}', "Line 2 of '.*q.jsonl' has no 'answer'"),
        ("[]", "Line 1 of '.*q.jsonl' has no 'question'"),
    ],
)
def test_questions_that_cannot_be_asked(tokenizer, books, tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    if line is not None:
        path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_books(tokenizer, books["hyde"], [books["holmes"]], length=20, retain_questions=path)


@pytest.mark.parametrize(
    "retain, options, message",
    [
        ([], {}, "`retain` is empty: give one book"),
        (["holmes", "hyde"], {}, r"\['hyde.txt'\] stand in two places"),
        (["holmes"], {"holdout": "holmes"}, r"\['holmes.txt'\] stand in two places"),
        (["holmes"], {"length": 2000}, "hyde.txt' is shorter than a passage of 4000 tokens"),
        (["holmes"], {"length": 150}, "There are [01] hold-out passages"),
    ],
)
def test_books_that_make_no_benchmark(tokenizer, books, retain, options, message):
    options = {key: books.get(value, value) for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        read_books(tokenizer, books["hyde"], [books[name] for name in retain], **{"length": 20, **options})


# ---- rows for the trainer -------------------------------------------------------------------------------------------


def test_a_row_is_trained_as_plain_text_and_as_it_is_scored(tokenizer, books, tmp_path, monkeypatch):
    """Also where the tokenizer has a chat template, and every token is labelled."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = read_books(tokenizer, books["hyde"], [books["holmes"]], length=20)
    assert tokenizer.chat_template and data.forget_rows["domain"] == ["hyde"] * len(data.forget)
    trainer = make_trainer(
        tmp_path, tokenizer, forget=data.forget_rows, retain=data.retain_rows, adapter={}, as_chat=None,
        others={"calibration_dataset": data.calibration_rows},
    )  # fmt: skip
    assert trainer.model.peft_config["default"].domains == ["hyde"]
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for row, passage in zip(trainer.train_dataset, data.forget, strict=True):
        ids, start = encode_pair(plain, passage)
        assert list(row["input_ids"]) == list(row["labels"]) == ids
        assert plain.decode(ids[start:]) == passage.completion + plain.eos_token


# ---- the questions of the package -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "book, questions",
    [
        ("stevenson-hyde.txt", "hyde_questions.jsonl"),
        ("yellow-wallpaper-gilman.txt", "yellow_wallpaper_questions.jsonl"),
    ],
)
def test_every_answer_is_in_the_book(tofu, book, questions):
    text = read_book(tofu.parent / "gutenberg" / book).lower()
    rows = [json.loads(line) for line in (DATA / questions).read_text().splitlines()]
    assert len(rows) >= 20
    for row in rows:
        missing = [word for word in row["answer"].lower().split() if word.removesuffix("s") not in text]
        assert not missing, row
