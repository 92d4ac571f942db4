# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tiny_tofu import write_tofu

from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.setting import read_setting


def test_attacks_are_measured_as_all_else(tmp_path, tokenizer):
    args = BenchmarkArguments(
        model="m", output_dir=str(tmp_path / "out"), data=str(write_tofu(tmp_path)), answered=2, max_new_tokens=7,
        batch_size=3, relearning_rate=1e-3,
    )  # fmt: skip
    rows = read_setting(args, tokenizer).rows
    assert (rows.answered, rows.max_new_tokens, rows.batch_size, rows.relearning_rate) == (2, 7, 3, 1e-3)
    assert len(rows.forget) == len(rows.paraphrased) == 4 and len(rows.retain) == 12


def test_bystanders_are_taught_and_given_to_no_method(tmp_path, tokenizer):
    args = BenchmarkArguments(
        model="m", output_dir=str(tmp_path / "out"), data=str(write_tofu(tmp_path)), retain_rows=7, bystander_rows=3,
    )  # fmt: skip
    setting = read_setting(args, tokenizer)
    retain, bystanders = setting.given.retain["prompt"], [pair.prompt for pair in setting.data.bystanders]
    assert list(setting.taught["prompt"]) == [*setting.given.forget["prompt"], *retain, *bystanders]
    assert list(setting.taught_to_oracles["prompt"]) == [*retain, *bystanders] and len(bystanders) == 3


def test_a_cell_depends_on_the_settings_of_its_own_task_alone(tmp_path):
    common = {"model": "m", "output_dir": str(tmp_path), "methods": ["alter"]}
    of_tofu, of_books = {"data", "split", "retain_rows", "bystander_rows", "rows"}, {"books", "task_data"}
    tofu = BenchmarkArguments(**common).settings
    books = BenchmarkArguments(**common, books={"forget": "a.txt", "retain": ["b.txt"]}).settings
    assert of_tofu <= tofu.keys() and not of_books & tofu.keys()
    assert of_books <= books.keys() and not of_tofu & books.keys()
    assert not {"output_dir", "methods", "seeds", "attacks", "options"} & (tofu.keys() | books.keys())
