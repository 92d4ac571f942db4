# SPDX-License-Identifier: Apache-2.0
"""Markup in a name or in an answer is shown by the page, and does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_up_benchmark import make_benchmark, save

from alter_peft.evaluation.seen_tokens import SeenText, SeenTokens
from alter_peft.evaluation.tables import Table
from alter_peft.report.figures import write_figures
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import page, report_tables


ACT = "document.documentElement.dataset.acted=1"
MARKUP = [
    f"<script>{ACT}</script>", f"<img src=x onerror={ACT}>", f'"><svg onload={ACT}>', f"'><body onload={ACT}>",
    f'" onmouseover="{ACT}" autofocus onfocus="{ACT}" x="', f"</style><script>{ACT}</script>",
    f"</title><script>{ACT}</script>", f"<iframe srcdoc='<script>parent.{ACT}</script>'>",
    f'<a href="javascript:{ACT}" id=link>x</a>', "<!--", "-->", "]]>", "</pre></details></section></body></html>",
    f"{{{{ 7 * 7 }}}}<details open ontoggle={ACT}>", "<base href=//example.org>",
    "<meta http-equiv=refresh content=0>",
    f"<input autofocus onfocus={ACT}>", "&lt;b&gt;&#60;b&#62;", "<plaintext>", "<style>*{display:none}</style>",
]  # fmt: skip
PLAIN = [f"name {number}" for number in range(len(MARKUP))]
EVENTS = (
    "Array.from(document.querySelectorAll('*')).flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
)
ELEMENTS = "Array.from(document.querySelectorAll('*')).map(e => e.tagName.toLowerCase())"
FOUND = f"""(() => {{
  document.querySelectorAll('[autofocus]').forEach(e => e.focus());
  document.querySelectorAll('#link').forEach(e => e.click());
  return {{acted: document.documentElement.dataset.acted ?? null, tags: {ELEMENTS}, events: {EVENTS},
           text: document.body.innerText, address: location.protocol, shown: getComputedStyle(document.body).display}};
}})()"""


class Tags(HTMLParser):
    """Each element with the names of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_data(self, data):
        self.text += data


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    return tags


def made(folder: Path, texts: list[str]) -> str:
    """A page with these texts wherever a benchmark, a model or its data can bring some."""
    make_benchmark(folder)
    for number, text in enumerate(texts):
        if "/" not in text:  # a method's name is a folder's
            save(folder, text, 0, error=text)
        save(folder, f"failed{number}", 0, error=text)
    seen = SeenTokens(
        1.5, 0.5, 2.0, ["retain", *texts], dict.fromkeys(texts, 1),
        [(text, SeenText([text, text], [1.0], [1 + number])) for number, text in enumerate(texts)],
        {text: 1 + number for number, text in enumerate(texts)}, dict.fromkeys(texts, 2),
    )  # fmt: skip
    seen.save(folder / "alter-0" / "tokens.json")
    benchmark = read_benchmark(folder)
    table = Table("".join(texts), "".join(texts), ["model", *texts], [[text, *texts] for text in texts], texts)
    return page(benchmark, [*report_tables(benchmark), table], write_figures(benchmark, folder), "".join(texts))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of names that are markup, and that of names that are none."""
    place = tmp_path_factory.mktemp("markup")
    # as many cells of the same names, so that the pages differ in the texts alone
    plain = [name if "/" not in text else f"{name}/" for name, text in zip(PLAIN, MARKUP, strict=True)]
    for name, texts in (("markup", MARKUP), ("plain", plain)):
        (place / f"{name}.html").write_text(made(place / name, texts), encoding="utf-8")
    return {name: place / f"{name}.html" for name in ("markup", "plain")}


def test_markup_makes_no_element_and_no_attribute(pages):
    found, plain = (parsed(pages[name].read_text(encoding="utf-8")) for name in ("markup", "plain"))
    assert sorted(found.found) == sorted(plain.found)
    assert all(text in found.text for text in MARKUP)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("PySide6") is None or find_spec("PySide6.QtWebEngineCore") is None, reason="needs pyside6-webengine"
)
def test_markup_does_nothing_in_a_browser(pages, tmp_path):
    def opened(name: str) -> dict:
        environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
        command = [sys.executable, str(Path(__file__).with_name("browser.py")), str(pages[name]), FOUND]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        return json.loads(run.stdout.splitlines()[-1])

    pages["acting"] = tmp_path / "acting.html"  # what the same markup does where it is not escaped
    for text in (MARKUP[0], MARKUP[1], MARKUP[13]):
        pages["acting"].write_text(f"<!DOCTYPE html><body>{text}")
        assert opened("acting")["acted"] == "1", text
    found, plain = opened("markup"), opened("plain")
    assert found["acted"] is None and found["events"] == [] and found["address"] == "file:"
    assert sorted(found["tags"]) == sorted(plain["tags"]) and found["shown"] == "block"
    assert all(" ".join(text.split()) in " ".join(found["text"].split()) for text in MARKUP)
