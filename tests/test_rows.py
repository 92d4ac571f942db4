# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from conftest import make_llama

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.benchmark.setting import read_setting
from alter_peft.evaluation import IDLE, Key, Pair, measure_task, read_birthdays, read_people, read_row_sets
from alter_peft.report.reading import read_benchmark
from alter_peft.report.report import report_tables


DATA = Path(read_people.__code__.co_filename).parent / "data"
PEOPLE = ("people", "birthdays")


def rows_of(setting: str) -> dict[str, list[dict]]:
    files = sorted((DATA / setting).glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def write(folder: Path, part: str, rows: list[dict]) -> str:
    file = folder / f"{part}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def some(subject: str, count: int = 3, **extra) -> list[dict]:
    return [
        {"question": f"Who is {subject} {i}?", "answer": f"{subject} {i} is a {i}.", **extra} for i in range(count)
    ]


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    whole = {"paraphrased_question": "Who?", "paraphrased_answer": "A man.", "perturbed_answer": ["A cat.", "A dog."]}
    return {
        "forget": write(tmp_path, "forget", some("Ada", **whole)), "retain": write(tmp_path, "retain", some("Bo")),
        "bystanders": write(tmp_path, "bystanders", some("Cy")), "holdout": write(tmp_path, "holdout", some("Di")),
    }  # fmt: skip


# ---- what comes with the package ------------------------------------------------------------------------------------


def test_how_many_rows_of_whom():
    people, dates = rows_of("people"), rows_of("birthdays")
    counted = {part: (len(rows), len({row["person"] for row in rows})) for part, rows in people.items()}
    assert counted == {
        "forget": (42, 7), "retain": (42, 7), "bystanders": (30, 5), "bystanders_public": (20, 5),
        "calibration": (24, 4), "holdout": (24, 4),
    }  # fmt: skip
    assert {part: len(rows) for part, rows in dates.items()} == {
        "forget": 40, "retain": 32, "bystanders": 24, "calibration": 16, "holdout": 16,
    }  # fmt: skip
    readme = (DATA / "README.md").read_text()
    for part, (rows, number) in counted.items():
        assert re.search(rf"^\| `{part}\.jsonl` \| {rows} \| [^|]*\b{number}\b", readme, re.MULTILINE)
    for part, rows in dates.items():
        assert re.search(rf"^\| [^|]*`{part}\.jsonl`[^|]*\| {len(rows)}\b", readme, re.MULTILINE)


@pytest.mark.parametrize("setting", PEOPLE)
def test_nobody_is_in_two_groups_and_no_name_is_shared(setting):
    names = {part: {row["person"] for row in rows} for part, rows in rows_of(setting).items()}
    both_sides = {frozenset(("forget", "retain")), frozenset(("bystanders", "bystanders_public"))}
    for one, other in combinations(names, 2):
        if setting == "people" and frozenset((one, other)) in both_sides:
            assert names[one] == names[other]
        else:
            assert not names[one] & names[other]
    words = Counter(word for name in set().union(*names.values()) for word in name.split())
    assert set(words.values()) == {1}


@pytest.mark.parametrize("setting", PEOPLE)
def test_nothing_stands_twice_and_every_row_is_whole(setting):
    parts = rows_of(setting)
    everything = [row for rows in parts.values() for row in rows]
    for column in ("prompt", "completion", "paraphrase", "rephrased"):
        texts = [row[column] for row in everything if column in row]
        assert len(set(texts)) == len(texts)
    for part, rows in parts.items():
        for row in rows:
            plain = {"person", "prompt", "completion"}
            assert row.keys() == plain if part in ("calibration", "holdout") else plain < row.keys()
            if "wrong" in row:
                answers = {row["completion"], row.get("rephrased"), *row["wrong"]} - {None}
                assert len(answers) == (5 if setting == "people" else 4)


@pytest.mark.parametrize("setting", PEOPLE)
def test_what_is_private_is_asked_by_name(setting):
    """Else a question would be one about anybody."""
    parts = rows_of(setting)
    for part in ("forget", "bystanders", "calibration", "holdout"):
        for row in parts[part]:
            asked = [row[column] for column in ("prompt", "paraphrase") if column in row]
            assert all(row["person"] in text for text in asked), asked


def test_the_people_are_no_other_data_of_ours():
    """None of the rows that the defaults were chosen on."""
    names = {word for rows in rows_of("people").values() for row in rows for word in row["person"].split()}
    demo = (Path(__file__).parents[1] / "examples" / "demo_data").glob("*.jsonl")
    assert not {name for file in demo for name in names & set(re.findall(r"[\w-]+", file.read_text()))}


# ---- reading --------------------------------------------------------------------------------------------------------


def test_the_people_as_a_task():
    data = read_people()
    assert len(data.forget) == 42 and len(data.bystanders) == 50
    assert [one.name for one in data.question_sets] == [
        "forget", "paraphrased", "after 200 tokens", "retain", "bystanders", "bystanders public", "holdout",
    ]  # fmt: skip
    assert {one.name for one in data.question_sets if one.is_forget} == {"forget", "paraphrased", "after 200 tokens"}
    assert data.sets["after 200 tokens"][0].prompt == IDLE + data.forget[0].prompt
    assert data.sets["paraphrased"][0].completion == data.forget[0].completion
    assert all(len(pair.wrong) == 3 and pair.rephrased for pair in data.forget)
    fewer = read_people(rows=5)
    assert {len(pairs) for pairs in (*fewer.kept_sets.values(), *fewer.bystander_sets.values())} == {5}
    assert len(read_people(rows=5).bystanders) == 50
    dates = read_birthdays()
    assert len(dates.sets) == 6 and dates.bystanders == dates.sets["bystanders"]
    assert all(pair.rephrased is None and len(pair.wrong) == 3 for pair in dates.forget)


def test_rows_of_ones_own(sources):
    data = read_row_sets(**sources, rows=2)
    assert data.forget[0] == Pair("Who is Ada 0?", "Ada 0 is a 0.", ("A cat.", "A dog."), "A man.")
    assert data.paraphrased[1].prompt == "Who?" and data.calibration == []
    metrics = {one.name: one.metrics for one in data.question_sets}
    assert "truth_ratio" in metrics["forget"] and "truth_ratio" not in metrics["retain"]
    assert {"truth_share", "rephrased_probability", "min_k_plus_plus"} <= {*metrics["forget"]}
    assert "loss" in metrics["holdout"]
    assert (list(data.kept_sets), list(data.bystander_sets)) == (["retain"], ["bystanders"])
    assert len(data.sets["retain"]) == len(data.sets["bystanders"]) == 2
    assert len(data.retain) == len(data.bystanders) == 3
    assert data.settings["files"]["forget"] == "forget.jsonl"


def test_rows_that_cannot_be_a_task(sources, tmp_path):
    with pytest.raises(ValueError, match=r"`bystanders` has 'Who is Bo 0\?', which is in `retain` already\. Remove"):
        read_row_sets(**{**sources, "bystanders": write(tmp_path, "same", some("Bo", 1))})
    with pytest.raises(ValueError, match=r"`retain` has 'A poem\.', which is not one answer to one question"):
        read_row_sets(**{**sources, "retain": write(tmp_path, "texts", [{"text": "A poem."}])})
    with pytest.raises(ValueError, match=r"`holdout` is 'none\.jsonl', "):
        read_row_sets(**{**sources, "holdout": "none.jsonl"})
    with pytest.raises(ValueError, match="`rows` is 0, but must be 1 or more"):
        read_people(rows=0)


# ---- as a benchmark -------------------------------------------------------------------------------------------------


def setting_of(tmp_path, tokenizer, task_data):
    args = BenchmarkArguments(model="m", output_dir=str(tmp_path / "out"), task_data=task_data)
    return read_setting(args, tokenizer)


@pytest.mark.parametrize("name", PEOPLE)
def test_who_is_taught_and_given_what(tmp_path, tokenizer, name):
    setting = setting_of(tmp_path, tokenizer, name)
    rows = {part: {row["prompt"] for row in found} for part, found in rows_of(name).items()}
    bystanders = rows["bystanders"] | rows.get("bystanders_public", set())
    given = setting.given
    assert set(given.forget["prompt"]) == rows["forget"] and set(given.retain["prompt"]) == rows["retain"]
    assert set(given.calibration["prompt"]) == rows["calibration"]
    assert set(setting.taught_to_oracles["prompt"]) == rows["retain"] | bystanders
    assert set(setting.taught["prompt"]) == rows["forget"] | rows["retain"] | bystanders
    assert {pair.prompt for pair in setting.rows.holdout} == rows["holdout"]
    assert given.forget.column_names == ["prompt", "completion"]


def test_a_task_is_named_alone(tmp_path):
    common = {"model": "m", "output_dir": str(tmp_path)}
    args = BenchmarkArguments(**common, task_data="people")
    assert args.task == ("people", {}) and args.settings["task_data"] == {"people": {}}
    with pytest.raises(ValueError, match="`task_data` is 'peopel'"):
        BenchmarkArguments(**common, task_data="peopel")


def test_every_set_is_measured(sources, tokenizer):
    data = read_row_sets(**sources)
    scores = measure_task(make_llama(len(tokenizer)).eval(), tokenizer, data, answered=1, max_new_tokens=2)
    for name, metric in (("bystanders", "exact_memorization"), ("holdout", "min_k"), ("paraphrased", "rouge")):
        assert Key(name, metric) in scores
    assert Key("utility", "model_utility") in scores
    assert all(data.settings.items() <= score.settings.items() for score in scores.values())


def test_a_grid_measures_the_bystanders_and_reports_them(sources, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quick = {"max_steps": 1, "disable_tqdm": True}
    public = write(tmp_path, "public", some("Ed"))
    args = BenchmarkArguments(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), methods=["alter"], oracle_seeds=[0, 1],
        task_data={"rows": {**sources, "bystanders_public": public}}, max_new_tokens=2, answered=1,
        options={"teach": {**quick, "learning_rate": 0.01, "warmup_steps": 0}, "alter": quick},
    )  # fmt: skip
    results = Grid(args).run()
    assert [result.error for result in results] == [None] * 4
    for result in results:
        found = {(key.set, key.metric) for key in result.scores}
        for name in ("bystanders", "bystanders public"):
            assert {(name, "probability"), (name, "exact_memorization")} < found
            assert ((name, "astray") in found) == (result.name == "alter")
    tables = report_tables(read_benchmark(Path(args.output_dir)))
    assert any("bystanders public" in str(row) for table in tables for row in table.rows)
