# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from html.parser import HTMLParser

import pytest
from made_up_benchmark import make_benchmark, save

from alter_peft.evaluation.seen_tokens import SeenText, SeenTokens
from alter_peft.evaluation.tables import Table
from alter_peft.report.figures import write_figures
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import page, report_tables


VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Every tag is closed in its order; keeps what is loaded from elsewhere, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return checker


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def made(folder, command="alter-peft report out"):
    benchmark = read_benchmark(folder)
    return page(benchmark, report_tables(benchmark), write_figures(benchmark, folder), command)


def test_well_formed_and_self_contained(folder):
    html = made(folder)
    found = checked(html)
    assert len(found.loaded) == found.tags.count("img") == 4
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in found.loaded)
    assert "script" not in found.tags and "link" not in found.tags and "url(" not in html and "@import" not in html
    assert found.tags.count("table") == 7 and "prefers-color-scheme: dark" in html


def test_it_says_how_everything_was_made(folder):
    text = checked(made(folder, "alter-peft report out --output_dir <x>")).text
    assert "Made by alter-peft report out --output_dir <x>." in text
    assert "alter, seed 1{" in text and '"learning_rate": 0.001' in text
    assert "lora, seed 0 (failed)RuntimeError: out of\nmemory | CUDA" in text


def test_names_are_escaped(folder):
    save(folder, "<b>bold", 0, error="<i>&")
    found = checked(made(folder))
    assert "<b>bold, seed 0" in found.text and "<i>&" in found.text and "b" not in found.tags


def test_tables_span_escape_and_have_notes(folder):
    table = Table(
        "Ti<tle", "Cap & tion", ["model", "P", "Q"], [["a|b", "1", "2"], ["c", "failed: <x>"]], ["why", "<o>"]
    )
    html = page(read_benchmark(folder), [table], [], "")
    assert "<h2>Ti&lt;tle</h2>" in html and "<p>Cap &amp; tion</p>" in html
    assert '<tr><th scope="row">a|b</th><td>1</td><td>2</td></tr>' in html
    assert '<tr><th scope="row">c</th><td class="sentence" colspan="2">failed: &lt;x&gt;</td></tr>' in html
    assert '<p class="note">[1] why</p>\n<p class="note">[2] &lt;o&gt;</p>' in html


def test_tokens_beside_the_results_are_taken_in(folder):
    for cell in ("alter-0", "alter-1"):
        text = SeenText(["étoken of", f" <{cell}>"], [1.0], [0])
        seen = SeenTokens(1.5, 0.5, 2.0, ["retain", "forget 1"], {"forget": 1}, [("forget", text)], {"a": 1}, {})
        seen.save(folder / cell / "tokens.json")
    html = made(folder)
    for cell in ("alter-0", "alter-1"):  # each says of which cell it is
        begin = html.index(f'<h2>Tokens of {cell}</h2>\n<section class="tokens">')
        assert "étoken of</span>" in html[begin:] and f"> &lt;{cell}&gt;</span>" in html[begin:]
    checked(html)
