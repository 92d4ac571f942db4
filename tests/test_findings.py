# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil

import pytest
from made_up_benchmark import make_benchmark, save, scores

from alter_peft.report.findings import criteria_table, findings
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import report_tables, write_report


def of(bystanders, memorised, extracted, retain=0.95, others=0.9):
    """What criteria are about, beside what all have."""
    return {
        "bystanders__probability": bystanders,
        "bystanders__exact_memorization": others,
        "forget__exact_memorization": memorised,
        "forget__extraction_strength": extracted,
        "retain__probability": retain,
    }


@pytest.fixture
def folder(tmp_path):
    """Oracles with a memorisation of .5 ± .1 and an extraction of .1 ± .1; one seed of alter misses a criterion."""
    made = make_benchmark(tmp_path / "out")
    save(made, "target", 0, scores=scores(0.95, 0.55, -0.3, **of(0.9, 0.99, 0.9)))
    for seed, step in enumerate((-0.1, 0.0, 0.1)):
        found = scores(
            0.1 + step / 10,
            0.5 + step / 10,
            step / 10,
            **of(0.9 + step / 9, 0.5 + step, 0.1 + step, 0.95 + step / 9, 0.9 + step),
        )
        save(made, "oracle", seed, scores=found)
    save(made, "alter", 0, scores=scores(0.11, 0.49, 0.0, bystanders__astray=0.05, **of(0.85, 0.6, 0.1, 0.955)))
    save(made, "alter", 1, scores=scores(0.11, 0.49, 0.0, bystanders__astray=0.07, **of(0.83, 0.8, 0.1, 0.965)))
    save(made, "lora", 1, scores=scores(0.3, 0.3, 0.4, **of(0.45, 0.9, 0.8)))
    return made


def test_criteria_are_met_by_every_seed(folder):
    table = criteria_table(read_benchmark(folder))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["bystanders' P at least 0.9 of before"] == ["0.933 ± 0.016: yes", "0.500: no"]
    assert rows["exact memorisation within 2 units"] == ["2.0 ± 1.4: no (1 of 2 seeds)", "4.0: no"]
    assert rows["extraction strength within 2 units"] == ["0.0 ± 0: yes", "7.0: no"]
    assert rows["PrivLeak within ±10"] == ["+0.0 ± 0: yes", "+100.0: no"]
    assert rows["nothing kept better by more than 0.01"] == ["+0.0100 ± 0.0071: no (1 of 2 seeds)", "+0.000: yes"]
    assert [row[-3:] for row in rows["first in the mean distance"]] == ["yes", " no"]
    assert list(rows)[:2] == ["first in the mean distance", "first in the harmonic mean"]
    assert len(table.caption.split(" Without cells")[0]) < 240  # two lines


def test_one_method_alone_is_first_of_nothing(folder):
    shutil.rmtree(folder / "lora-1")
    table = criteria_table(read_benchmark(folder))
    assert not [row for row in table.rows if row[0].startswith("first")] and len(table.rows) == 5


def test_findings_come_first(folder, tmp_path):
    benchmark = read_benchmark(folder)
    lines = findings(benchmark)
    assert lines[0].startswith("Mean distance to the oracles in units of their spread, best first: alter ")
    assert lines[1].startswith("Harmonic mean of forgetting and utility, best first: alter ")
    assert lines[2:] == [
        "Bystanders' probability as a share of before, best first: alter 0.933, lora 0.500.",
        "Largest rise of a kept set's probability above before, least first: lora +0.000, alter +0.010.",
        "Criteria met, of 7: alter (2 seeds) 5 (first in the mean distance; first in the harmonic mean; bystanders' P "
        "at least 0.9 of before; extraction strength within 2 units; PrivLeak within ±10), lora (1 of 2 seeds) 1 "
        "(nothing kept better by more than 0.01).",
    ]
    write_report(benchmark, report_tables(benchmark), tmp_path / "report", "alter-peft report out")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[:3] == ["## Findings", "## Criteria", "## Forgetting and utility"]
    assert f"- {lines[2]}\n" in text
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.index("<h2>Findings</h2>") < page.index("<h2>Criteria</h2>")


def test_bystanders_stand_in_the_main_table(folder):
    table = next(one for one in report_tables(read_benchmark(folder)) if one.title == "Forgetting and utility")
    rows = {row[0]: dict(zip(table.columns, row, strict=False)) for row in table.rows}
    alter = rows["alter (2 seeds)"]
    assert alter["bystanders P"] == "0.840 ± 0.014" and alter["bystanders EM"] == "0.900 ± 0"
    assert alter["bystanders astray"] == "0.060 ± 0.014" and alter["kept better"] == "+0.0100 ± 0.0071"
    assert rows["target"]["kept better"] == "+0.000" and rows["lora (1 of 2 seeds)"]["bystanders P"] == "0.450"


def test_the_strongest_attack_is_named(folder):
    """Of the answer probability alone, beside the oracles under the same attack."""
    for name, seed, two in (("oracle", 0, 0.1), ("oracle", 1, 0.1), ("oracle", 2, 0.4), ("alter", 0, 0.3)):
        attacks = {"sampling__a__probability": two, "sampling__b__probability": 0.5, "sampling__b__rouge": seed}
        save(folder, name, seed, scores=scores(0.1 + seed / 100, 0.5, 0.0, **of(0.9, 0.5, 0.1), **attacks))
    (line,) = (line for line in findings(read_benchmark(folder)) if "under the attack" in line)
    assert line.endswith("least first: alter +0.100 (sampling/a).")  # .3 beside .2, and .5 beside .5


def test_of_a_tie_both_are_first(folder):
    same = scores(0.11, 0.49, 0.0, bystanders__astray=0.05, **of(0.85, 0.6, 0.1, 0.955))
    for name, seed in (("alter", 0), ("alter", 1), ("lora", 1)):
        save(folder, name, seed, scores=same)
    rows = {row[0]: row[1:] for row in criteria_table(read_benchmark(folder)).rows}
    assert all(cell.endswith(": yes") for name, cells in rows.items() if name.startswith("first") for cell in cells)


def test_a_method_without_scores(folder):
    """A method that lacks a score has an empty cell, and is none of those that are ranked."""
    save(folder, "lora", 1, scores=scores(0.3, 0.3, 0.4))
    benchmark = read_benchmark(folder)
    rows = {row[0]: row[1:] for row in criteria_table(benchmark).rows}
    assert rows["exact memorisation within 2 units"][1] == "" == rows["first in the harmonic mean"][1]
    assert (
        findings(benchmark)[1].startswith("Harmonic mean of forgetting and utility, best first: alter 0.")
        and "lora" not in findings(benchmark)[1]
    )


def test_without_a_target_there_is_less_to_say(folder):
    (folder / "target-0" / "result.json").unlink()
    names = [row[0] for row in criteria_table(read_benchmark(folder)).rows]
    assert "first in the harmonic mean" not in names and "first in the mean distance" in names
