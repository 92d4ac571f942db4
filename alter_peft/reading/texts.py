# SPDX-License-Identifier: Apache-2.0
"""Files -> text: what they are compressed by and in which encoding they are, found by their bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple


# First bytes -> what opens the file
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# First bytes -> what the file is, and what to give in its place
NO_TEXT = {
    b"PK\x03\x04": "a zip archive or an Office document: unpack it, or save its table as CSV",
    b"%PDF": "a PDF: save its text as .txt",
    b"\xd0\xcf\x11\xe0": "an old Office document: save its table as CSV",
    b"SQLite format 3": "a database: export its table as CSV",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard: unpack it",
}
MARKS = {  # UTF-32's first: it begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BLOCK = 1 << 20
UNKNOWN = "which is in no encoding that can be told from its bytes. Save it as UTF-8"
MOST_FOREIGN = 0.3  # share of letters beyond ASCII in a text of a Western language, at most; English has 0, Czech 0.15


class TextFile(NamedTuple):
    """
    A file of text.

    note: what was found of its encoding, if it is another one than UTF-8; else empty.
    """

    path: Path
    encoding: str
    note: str = ""

    @contextmanager
    def open(self, newline: str | None = None) -> Iterator[IO[str]]:
        """The text, unpacked; ends of lines as the built-in `open` treats them."""
        with open_binary(self.path) as raw, io.TextIOWrapper(raw, encoding=self.encoding, newline=newline) as text:
            yield text

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, with their numbers from 1; `\\n` alone ends one, as in JSON lines."""
        with self.open(newline="\n") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, line


def open_binary(path: Path) -> Any:
    """The bytes of a file, unpacked if it is compressed, whatever its suffix says."""
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    return path.open("rb") if opener is None else opener(path, "rb")


def first_bytes(path: Path, count: int = 4096) -> bytes:
    """What a file begins with, unpacked."""
    with open_binary(path) as file:
        found: bytes = file.read(count)
    return found


def text_file(path: Path) -> TextFile:
    """
    The file, its encoding found: by its mark (BOM), UTF-16, UTF-8, or Windows-1252, which has all letters of Latin-1.

    Raises:
        ValueError: it is no text, or text in another encoding; the message goes on after the file's name.
    """
    start = first_bytes(path)
    what = next((what for magic, what in NO_TEXT.items() if start.startswith(magic)), None)
    if what is not None:
        raise ValueError(f"which is {what}")
    found = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), _unmarked(start))
    if found == "utf-8":
        return _utf8_or_western(path)
    _check(path, found)
    return TextFile(path, found, "" if found == "utf-8-sig" else found.upper())


def _unmarked(start: bytes) -> str:
    """UTF-16, if every other byte of nearly all is 0, as it is in Western text; else UTF-8, until that is checked."""
    half = max(1, len(start) // 2)
    low, high = (start[offset::2].count(0) / half for offset in (1, 0))
    if low > 0.7 and high < 0.1:
        return "utf-16-le"
    return "utf-16-be" if high > 0.7 and low < 0.1 else "utf-8"


def _utf8_or_western(path: Path) -> TextFile:
    try:
        has_foreign = False
        for text in _decoded(path, "utf-8"):
            has_foreign = has_foreign or not text.isascii()
            if "\x00" in text[:4096]:
                raise ValueError("which is binary, not text")
        return TextFile(path, "utf-8")
    except UnicodeDecodeError as error:
        if has_foreign or not error.object[: error.start].isascii():  # it was UTF-8 up to there
            raise ValueError(
                f"which is UTF-8 with a broken character (byte {error.object[error.start]:#x})"
            ) from error
    _check(path, "cp1252")
    return TextFile(path, "cp1252", "Windows-1252 (Latin-1); save it as UTF-8 if letters are wrong")


def _check(path: Path, encoding: str) -> None:
    """Raise a `ValueError` unless all of a file is in an encoding and, if that is Western, looks like it."""
    letters = foreign = 0
    try:
        for text in _decoded(path, encoding):
            letters += sum(map(str.isalpha, text))
            foreign += sum(character > "\x7f" and character.isalpha() for character in text)
    except UnicodeError as error:
        raise ValueError(f"{UNKNOWN} ({error})") from error
    if encoding == "cp1252" and foreign > MOST_FOREIGN * letters:
        raise ValueError(UNKNOWN)


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_binary(path) as file:
        while block := file.read(BLOCK):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)
