# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from made_up_benchmark import make_benchmark, named, save, scores

from alter_peft.evaluation.tables import to_markdown
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import report_tables, write_report


MAIN = """\
| model | mean distance | forgetting | harmonic mean | forget P | truth ratio | KS | p of KS | PrivLeak | utility | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
| target | 14.1 | 0.000 | 0.000 | 0.950 | 0.500 | 0.50 (0.50 to 0.50) | 0.77 | -93.8 | 0.550 | 30 |
| oracle (3 seeds) | 0.9 ± 0.8 | 0.9922 ± 0.0068 | 0.949 ± 0.010 | 0.100 ± 0.010 | 0.800 ± 0.010 | 0.25 (0.25 to 0.25) | 1 | +3.2 ± 38.2 | 0.500 ± 0.010 | 20 ± 0 |
| alter (2 seeds) | 0.5 ± 0.1 | 0.976 ± 0.017 | 0.9317 ± 0.0076 | 0.120 ± 0.014 | 0.800 ± 0 | 0.25 (0.00 to 0.25) | 1 | +0.0 ± 0 | 0.490 ± 0 | 11.0 ± 1.4 |
| lora (1 of 2 seeds) | 17.8 | 0.882 | 0.515 | 0.000 | 1.200 | 0.50 (0.50 to 0.75) | 0.77 | +100.0 | 0.200 | 8.0 |
| lora, seed 0 | failed: RuntimeError: out of memory \\| CUDA |  |  |  |  |  |  |  |  |  |"""  # noqa: E501
CRITERIA = """\
| criterion | alter (2 seeds) | lora (1 of 2 seeds) |
|---|---|---|
| first in the mean distance | 0.50 ± 0.12: yes | 17.8: no |
| first in the harmonic mean | 0.9317 ± 0.0076: yes | 0.515: no |
| PrivLeak within ±10 | +0.0 ± 0: yes | +100.0: no |"""
DISTANCES = """\
| score | mean of the oracles | unit | an oracle | target | alter (2 seeds) | lora (1 of 2 seeds) |
|---|---|---|---|---|---|---|
| forget/probability | 0.100 | 0.01 | 2.1 (0.0 to 2.1) | +85.0 | +2.0 ± 1.4 | -10.0 |
| forget/truth_ratio | 0.800 | 0.01 | 2.1 (0.0 to 2.1) | -30.0 | +0.0 ± 0.0 | +40.0 |
| forget/min_k | 2.500 | 0.1 | 2.1 (0.0 to 2.1) | -30.0 | +0.0 ± 0.0 | +40.0 |
| holdout/min_k | 2.500 | 0.14 | 0.0 (0.0 to 0.0) | +0.0 | +0.0 ± 0.0 | +0.0 |
| utility/model_utility | 0.500 | 0.01 | 2.1 (0.0 to 2.1) | +5.0 | -1.0 ± 0.0 | -30.0 |
| forget/membership_auc | 0.500 | 0.12 | 2.1 (0.0 to 2.1) | -3.8 | +0.0 ± 0.0 | +4.0 |
| largest |  |  | 2.1 (0.0 to 2.1) | 85.0 | 2.0 ± 1.4 | 40.0 |
| mean of forget |  |  | 2.1 (0.0 to 2.1) | 37.2 | 0.5 ± 0.4 | 23.5 |
| mean of holdout |  |  | 0.0 (0.0 to 0.0) | 0.0 | 0.0 ± 0.0 | 0.0 |
| mean of utility |  |  | 2.1 (0.0 to 2.1) | 5.0 | 1.0 ± 0.0 | 30.0 |
| mean of the sets |  |  | 1.4 (0.0 to 1.4) | 14.1 | 0.5 ± 0.1 | 17.8 |"""
SCORES = """\
| score | target | oracle (3 seeds) | alter (2 seeds) | lora (1 of 2 seeds) |
|---|---|---|---|---|
| forget/probability | 0.950 | 0.100 ± 0.010 | 0.120 ± 0.014 | 0.000 |
| forget/truth_ratio | 0.500 | 0.800 ± 0.010 | 0.800 ± 0 | 1.200 |
| forget/min_k | -0.500 | 2.500 ± 0.100 | 2.500 ± 0 | 6.500 |
| forget/membership_auc | 0.031 | 0.500 ± 0.125 | 0.500 ± 0 | 1.000 |
| holdout/min_k | 2.500 | 2.500 ± 0 | 2.500 ± 0 | 2.500 |
| utility/model_utility | 0.550 | 0.500 ± 0.010 | 0.490 ± 0 | 0.200 |"""
ATTACKS = """\
| attack | target | oracle (3 seeds) | alter (2 seeds) | lora (1 of 2 seeds) |
|---|---|---|---|---|
| none | 0.950 (+85.0) | 0.100 ± 0.010 | 0.120 ± 0.014 (+2.0 ± 1.4) | 0.000 (-10.0) |
| relearning/held-out half, step 0 | 0.900 (+inf) | 0.100 ± 0 | 0.100 ± 0 (+0.0 ± 0.0) | 0.000 (-inf) |
| relearning/held-out half, step 50 | 1.000 (+40.0) | 0.600 ± 0.010 | 0.500 ± 0 (-10.0 ± 0.0) | 0.900 (+30.0) |
| asking_otherwise/misspelt | [1] | 0.050 ± 0 | [1] | [1] |

[1] Not measured for target, alter (2 seeds), lora (1 of 2 seeds)."""
GUARDS = """\
| score | target | oracle (3 seeds) | alter (2 seeds) | lora (1 of 2 seeds) |
|---|---|---|---|---|
| forget/astray | [1] | [1] | 0.100 ± 0 | [1] |

[1] Not measured for target, oracle (3 seeds), lora (1 of 2 seeds)."""
CELLS = """\
| cell | training, s | evaluation, s |
|---|---|---|
| target, seed 0 | 30 |  |
| oracle, seed 0 | 20 |  |
| oracle, seed 1 | 20 |  |
| oracle, seed 2 | 20 |  |
| alter, seed 0 | 10 | 5.0 |
| alter, seed 1 | 12 | 5.0 |
| lora, seed 1 | 8.0 |  |
| lora, seed 0 (failed) |  |  |"""
TABLES = {
    "Criteria": CRITERIA,
    "Forgetting and utility": MAIN,
    "Distance to the oracle": DISTANCES,
    "Scores by set": SCORES,
    "Attacks": ATTACKS,
    "Guards": GUARDS,
    "Cells": CELLS,
}


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def found_tables(folder):
    return {table.title: table for table in report_tables(read_benchmark(folder))}


def row(table, name):
    return next(row for row in table.rows if row[0] == name)


def cells(table, name):
    """Column -> what it has in a row."""
    return dict(zip(table.columns, row(table, name), strict=True))


@pytest.mark.parametrize(("title", "expected"), TABLES.items())
def test_tables_in_full(folder, title, expected):
    assert to_markdown(found_tables(folder)[title]) == expected


def test_no_table_of_what_was_not_measured(folder):
    for name, seed in (("oracle", 0), ("oracle", 1), ("oracle", 2), ("alter", 0), ("alter", 1), ("lora", 1)):
        save(folder, name, seed, scores=scores(0.1 + seed / 100, 0.5))
    save(folder, "target", 0, scores=scores(0.9, 0.5))
    found = found_tables(folder)
    assert list(found) == ["Criteria", "Forgetting and utility", "Distance to the oracle", "Scores by set", "Cells"]
    assert "seconds" not in found["Forgetting and utility"].columns


def test_a_score_that_only_some_seeds_have_says_so(folder):
    save(folder, "alter", 1, scores=scores(0.13, 0.4), without=["utility/model_utility", "forget/truth_ratio"])
    found = found_tables(folder)
    of_alter = cells(found["Forgetting and utility"], "alter (2 seeds)")
    assert of_alter["utility"] == "0.490 (1 of 2 seeds)"
    assert of_alter["KS"].endswith("(0.00 to 0.25) (1 of 2 seeds)")
    assert of_alter["forget P"] == "0.120 ± 0.014"
    table = found["Distance to the oracle"]
    assert cells(table, "utility/model_utility")["alter (2 seeds)"] == "-1.0 (1 of 2 seeds)"
    mean = cells(table, "mean of the sets")  # one over fewer scores than the others' would pass for theirs
    assert table.notes[int(mean["alter (2 seeds)"][1:-1]) - 1].startswith("Not taken over the scores that are left")
    assert mean["target"] == "14.1"


def test_a_score_that_an_oracle_lacks_is_named(folder):
    save(folder, "oracle", 1, scores=scores(0.1, 0.5), without=["utility/model_utility"])
    table = found_tables(folder)["Distance to the oracle"]
    assert " Without `utility/model_utility`, which not every oracle has." in table.caption
    assert "utility/model_utility" not in [row[0] for row in table.rows]


def test_all_seeds_of_a_method_may_fail(folder):
    save(folder, "lora", 1, error="ValueError: " + "long " * 100)
    found = found_tables(folder)
    names = [row[0] for row in found["Forgetting and utility"].rows]
    assert names == ["target", "oracle (3 seeds)", "alter (2 seeds)", "lora, seed 0", "lora, seed 1"]
    assert found["Forgetting and utility"].rows[-1][1].endswith("long ...")
    assert found["Attacks"].columns == ["attack", "target", "oracle (3 seeds)", "alter (2 seeds)"]
    for title in ("Distance to the oracle", "Scores by set", "Attacks", "Guards"):
        assert found[title].caption.endswith(" Without cells that failed: lora of seed 0, lora of seed 1.")


def test_why_a_score_is_missing(folder):
    save(
        folder,
        "oracle",
        0,
        scores=scores(0.1, 0.5, merged_quantization__int8__rouge=0.2, quantization__int8__rouge=0.2),
    )
    save(folder, "alter", 0, scores=scores(0.1, 0.5), skipped={"merged_quantization": "it gates"})
    save(folder, "lora", 1, scores=scores(0.1, 0.5), error="RuntimeError: no memory")
    found = found_tables(folder)
    table = found["Attacks"]
    merged, quantized = row(table, "merged_quantization/int8: rouge"), row(table, "quantization/int8: rouge")
    assert merged[2] == quantized[2] == "0.200 (1 of 3 seeds)"
    notes = {f"[{number}]": note for number, note in enumerate(table.notes, 1)}
    assert [notes[merged[i]] for i in (1, 3, 4)] == [
        "Not measured for target.",
        "Not measured for alter (2 seeds): it gates",
        "Not measured for lora (1 of 2 seeds): RuntimeError: no memory",
    ]
    assert notes[quantized[3]] == notes[quantized[1]] == "Not measured for target, alter (2 seeds)."
    assert row(found["Forgetting and utility"], "lora, seed 1") == [
        "lora, seed 1",
        "failed in part: RuntimeError: no memory",
    ]


def test_other_benchmarks_show_all_their_scores(tmp_path):
    for name, seed, value in (("target", 0, 0.9), ("oracle", 0, 0.25), ("oracle", 1, 0.35), ("alter", 0, 0.3)):
        save(tmp_path, name, seed, scores=named(wmdp_bio__acc=value))
    assert to_markdown(found_tables(tmp_path)["Forgetting and utility"]) == (
        "| model | mean distance | wmdp_bio acc |\n|---|---|---|\n| target | 8.5 | 0.900 |\n"
        "| oracle (2 seeds) | [1] | 0.300 ± 0.071 |\n| alter | 0.0 | 0.300 |\n\n"
        "[1] An oracle is compared with the others if there are three at least."
    )


def test_the_membership_of_the_oracles_may_be_none(folder):
    """PrivLeak is a share of their mean AUC; all else is shown where that is 0."""
    for seed in range(3):
        save(folder, "oracle", seed, scores=scores(0.1 + seed / 100, 0.5, forget__membership_auc=0.0))
    found = found_tables(folder)
    table = found["Forgetting and utility"]
    assert cells(table, "alter (2 seeds)")["PrivLeak"] == "[1]"
    assert cells(table, "alter (2 seeds)")["forget P"] == "0.120 ± 0.014"
    assert table.notes[0].startswith("PrivLeak has no value. ")
    assert cells(found["Distance to the oracle"], "forget/membership_auc")["alter (2 seeds)"] == "+inf"


def test_a_utility_of_0_names_the_score_that_makes_it(folder):
    save(folder, "target", 0, scores=scores(0.9, 0.0, retain__rouge=0.5, real_authors__rouge=0.0))
    table = found_tables(folder)["Forgetting and utility"]
    assert cells(table, "target")["utility"] == "0.000 [1]"
    assert table.notes[0] == "Model utility is 0 where one of its nine scores is. Of target: `real_authors/rouge`."


def test_two_oracles_have_no_distance_to_the_others(folder):
    (folder / "oracle-2" / "result.json").unlink()
    table = found_tables(folder)["Distance to the oracle"]
    assert {row[3] for row in table.rows} == {"[1]"} and "there are three at least" in table.notes[0]
    assert "within 15.6," in table.caption and "An oracle: each" not in table.caption


def test_where_the_oracles_agree_in_every_row_there_is_a_unit(folder):
    for seed in range(3):
        same = named(forget__extraction_strength=[0.0] * 4, b__acc=0.5)
        save(folder, "oracle", seed, scores=scores(0.1 + seed / 100, 0.5), curves=same)
    save(folder, "lora", 1, scores=scores(0.1, 0.5), curves=named(forget__extraction_strength=[1.0, 0.0, 0.0, 0.0]))
    table = found_tables(folder)["Distance to the oracle"]
    strength = cells(table, "forget/extraction_strength")
    assert strength["unit"] == "0.14" and strength["lora (1 of 2 seeds)"] == "+1.7"  # .25 / (1 / (4 sqrt 3))
    assert cells(table, "b/acc")["unit"] == cells(table, "utility/model_utility")["unit"] == "0 [1]"
    assert table.notes[0] == "The oracles agree exactly on this score, of which there are no rows: no unit."


def test_no_distance_under_an_attack_on_one_oracle(folder):
    save(folder, "oracle", 0, scores=scores(0.1, 0.5, quantization__int8__rouge=0.2))
    save(folder, "lora", 1, scores=scores(0.1, 0.5, quantization__int8__rouge=0.9))
    table = found_tables(folder)["Attacks"]
    found = cells(table, "quantization/int8: rouge")
    text, mark = found["lora (1 of 2 seeds)"].split()
    assert text == "0.900" and found["oracle (3 seeds)"] == "0.200 (1 of 3 seeds)"
    assert table.notes[int(mark[1:-1]) - 1] == "No distance: fewer than two oracles were so attacked."


def test_an_adapter_switched_off_is_beside_the_oracles_own_scores(folder):
    why = {"switching_off": "it has no adapter"}
    for seed, step in enumerate((-0.01, 0.0, 0.01)):
        save(folder, "oracle", seed, scores=scores(0.1 + step, 0.5 + step, step), skipped=why)
    save(folder, "lora", 1, scores=scores(0.1, 0.5, switching_off__forget__probability=0.9))
    table = found_tables(folder)["Attacks"]
    found = cells(table, "switching_off/forget")
    assert found["lora (1 of 2 seeds)"] == "0.900 (+80.0)"
    note = table.notes[int(found["oracle (3 seeds)"][1:-1]) - 1]
    assert note == "Not measured for oracle (3 seeds): it has no adapter" and "(3 oracles)" in table.caption


def test_one_way_of_asking_that_is_left_out_says_why(folder):
    save(folder, "lora", 1, scores=scores(0.1, 0.5), skipped={"asking_otherwise/misspelt": "no words"})
    table = found_tables(folder)["Attacks"]
    note = table.notes[int(cells(table, "asking_otherwise/misspelt")["lora (1 of 2 seeds)"][1:-1]) - 1]
    assert note == "Not measured for lora (1 of 2 seeds): no words"


def test_cells_say_what_differs_between_them(folder):
    same = {"peft": "0.21"}
    for seed, day in enumerate(("2026-11-24", "2026-11-25")):
        save(
            folder, "alter", seed, scores=scores(0.1, 0.5), seconds={"training": 9.0, "attack: sampling": 61.0},
            environment={**same, "date": day}, settings={"data": "tofu", "options": {"r": seed}},
        )  # fmt: skip
    table = found_tables(folder)["Cells"]
    of_second = cells(table, "alter, seed 1")
    assert (of_second["date"], of_second["settings"]) == ("2026-11-25", 'options: {"r": 1}')
    assert (of_second["training, s"], of_second["attack: sampling, s"]) == ("9.0", "61")
    assert "Alike in all cells: machine: 2 CPU threads; peft: 0.21." in table.caption
    assert "Settings of all: data: tofu." in table.caption


def test_every_note_is_pointed_to(folder):
    save(folder, "oracle", 0, scores=scores(0.1, 0.5, quantization__int8__rouge=0.2, b__acc=0.5))
    save(folder, "lora", 1, scores=scores(0.1, 0.5, quantization__int8__rouge=0.9, b__acc=0.5))
    for table in found_tables(folder).values():
        text = " ".join(cell for row in table.rows for cell in row)
        assert [number for number in range(1, len(table.notes) + 1) if f"[{number}]" not in text] == [], table.title


def test_the_caption_says_what_the_columns_are(folder, tmp_path):
    caption = found_tables(folder)["Forgetting and utility"].caption
    assert caption.startswith("Mean ± sample standard deviation over seeds. Mean distance: to the oracles")
    assert "Truth ratio: " in caption and "Seconds: of the training." in caption and caption.count(" P: ") == 1
    assert "astray: " in found_tables(folder)["Guards"].caption
    assert "fluency" not in found_tables(folder)["Guards"].caption
    absent = ("VerbMem", "BLEU", "EM: ", "ES: ", "acc: ")
    assert not [name for name in absent if name in caption]
    for name, seed, value in (("target", 0, 0.9), ("oracle", 0, 0.2), ("oracle", 1, 0.3), ("alter", 0, 0.3)):
        found = named(**{f"forget__{metric}": [value] for metric in ("verbmem", "knowmem", "bleu", "rouge_f")})
        settings = {"answered": 6, "books": {"forget": "hyde.txt"}, "target": None}
        save(tmp_path / "books", name, seed, scores=found, settings=settings)
    tables = found_tables(tmp_path / "books")
    caption = tables["Forgetting and utility"].caption
    assert all(f"{name}: " in caption for name in ("VerbMem", "KnowMem", "ROUGE-L F", "BLEU", "Similarity gap"))
    assert not [name for name in (" P: ", "KS", "Truth ratio", "PrivLeak", "acc: ", "Seconds") if name in caption]
    assert tables["Cells"].caption.endswith('Settings of all: answered: 6; books: {"forget": "hyde.txt"}.')
    assert (
        "min_k" not in tables["Scores by set"].caption
        and "forms in which" not in tables["Distance to the oracle"].caption
    )


def test_seconds_of_several_machines_say_which(folder):
    seconds = {"training": 9.0, "evaluation": 3.0, "attack: sampling": 61.0}
    save(folder, "alter", 0, scores=scores(0.1, 0.5), seconds=seconds, machines={"attack: sampling": "a server"})
    found = found_tables(folder)["Cells"]
    machines = "2 CPU threads (training, evaluation); a server (attack: sampling)"
    assert cells(found, "alter, seed 0")["machine"] == machines
    assert cells(found, "alter, seed 1")["machine"] == "2 CPU threads"


def test_books(folder):
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        save(folder, "oracle", seed, scores=scores(value, 0.5, forget__rouge_f=value, forget__bleu=value))
    save(folder, "alter", 0, scores=scores(0.1, 0.5, forget__verbmem=0.4, forget__rouge_f=0.1, forget__bleu=0.3))
    table = found_tables(folder)["Forgetting and utility"]
    of_alter = cells(table, "alter (2 seeds)")
    assert of_alter["VerbMem"] == "0.400 (1 of 2 seeds)" and of_alter["BLEU"] == "0.300 (1 of 2 seeds)"
    assert of_alter["similarity gap"] == "0.100 (1 of 2 seeds)"
    assert cells(table, "oracle (3 seeds)")["similarity gap"] == "0.100 ± 0.087"


def test_written_report(folder, tmp_path):
    benchmark, output = read_benchmark(folder), tmp_path / "new" / "report"
    write_report(benchmark, report_tables(benchmark), output, "alter-peft report out")
    pictures = ["experts.png", "plane.png", "relearning-held-out-half-probability.png", "time.png"]
    assert sorted(path.name for path in output.iterdir()) == sorted(["report.html", "report.md", *pictures])
    text = (output / "report.md").read_text()
    assert text.startswith("# Benchmark out\n\nMade by `alter-peft report out`.\n\n## Findings\n\n- Mean distance to ")
    for title, table in TABLES.items():
        assert f"\n\n## {title}\n\n" in text and f"\n\n{table}\n\n" in text
    for name in pictures:
        assert f"]({name})" in text
