# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from made_up_benchmark import curve, make_benchmark, save, scores

from alter_peft.evaluation import Score
from alter_peft.evaluation.tables import to_markdown
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import report_tables


EXPECTED = """\
| after requests | 0 | 1 | 2 |
|---|---|---|---|
| retain | 0.900 | 0.850 | 0.800 (1 of 2 seeds) |
| real authors | 0.500 | 0.400 |  |
| utility | 0.600 |  | 0.600 |
| forgotten so far |  | 0.250 | 0.150 |
| still to come | 0.900 | 0.800 |  |
| request 1 | 0.900 | 0.250 | 0.0050 |
| request 2 | 0.900 | 0.800 | 0.350 |
| request 3 | 0.900 | 0.900 | 0.900 |
| the request just made |  | 0.250 | 0.350 |"""


def curves(shift: float) -> list[Score]:
    """After 0, 1 and 2 requests, of which one seed has less above and the other below the mean."""
    return [
        *curve("retain", {0: 0.9, 1: 0.85, **({2: 0.8} if shift > 0 else {})}),
        *curve("real_authors", {0: 0.5, 1: 0.4 + shift}),
        *curve("utility", {0: 0.6, 2: 0.6}),
        *curve("request 3", {0: 0.9, 1: 0.9, 2: 0.9}),
        *curve("request 2", {0: 0.9, 1: 0.8, 2: 0.35 + shift}),
        *curve("request 1", {0: 0.9, 1: 0.25 - shift, 2: 0.005}),
        *curve("still to come", {0: 0.9, 1: 0.8}),
        *curve("forgotten so far", {1: 0.25, 2: 0.15 - shift}),
    ]


def test_a_table_a_method_of_what_each_request_leaves(tmp_path):
    folder = make_benchmark(tmp_path / "out")
    for seed, shift in ((0, 0.1), (1, -0.1)):
        save(folder, "alter", seed, scores=scores(0.1, 0.5), curves=curves(shift))
    save(folder, "lora", 1, scores=scores(0.1, 0.5), curves=curve("retain", {0: 0.9}))
    of_alter, of_lora = (table for table in report_tables(read_benchmark(folder)) if "Requests" in table.title)
    assert (of_alter.title, of_lora.title) == ("Requests: alter (2 seeds)", "Requests: lora (1 of 2 seeds)")
    assert to_markdown(of_alter) == EXPECTED
    assert of_alter.caption.endswith("The oracles have 0.100 ± 0.010 on all requests together.")
    assert of_lora.rows == [["retain", "0.900"]]


def test_no_table_without_requests(tmp_path):
    titles = [table.title for table in report_tables(read_benchmark(make_benchmark(tmp_path / "out")))]
    assert not [title for title in titles if title.startswith("Requests")]
