# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from alter_peft.evaluation.tables import Table, to_html, to_markdown


TABLE = Table("Ti<tle", "Cap & tion", ["model", "P", "Q"], [["a|b", "1", "2"], ["c", "failed: <x>"]])


def test_markdown_pads_and_escapes():
    expected = "| model | P | Q |\n|---|---|---|\n| a\\|b | 1 | 2 |\n| c | failed: <x> |  |"
    assert to_markdown(TABLE) == expected


def test_html_spans_and_escapes():
    html = to_html(TABLE)
    assert "<h2>Ti&lt;tle</h2>" in html and "Cap &amp; tion" in html
    assert '<tr><th scope="row">a|b</th><td>1</td><td>2</td></tr>' in html
    assert '<tr><th scope="row">c</th><td class="sentence" colspan="2">failed: &lt;x&gt;</td></tr>' in html


def test_a_footnote_is_written_once():
    table = Table("", "", ["a", "b", "c"])
    table.rows.append(["x", table.mark("why"), table.mark("other")])
    table.rows.append(["y", table.mark("why"), "1"])
    assert table.rows == [["x", "[1]", "[2]"], ["y", "[1]", "1"]]
    assert to_markdown(table).endswith("| y | [1] | 1 |\n\n[1] why\n\n[2] other")
    assert to_html(table).count('<p class="note">[1] why</p>') == 1
