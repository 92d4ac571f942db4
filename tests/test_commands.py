# SPDX-License-Identifier: Apache-2.0
"""`alter-peft report` from the command line on, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import make_llama
from filelock import FileLock
from made_up_benchmark import make_benchmark, save, scores
from peft import LoraConfig, get_peft_model
from tiny_tofu import write_tofu

from alter_peft import UnlearnTrainer
from alter_peft.benchmark import cell as cells
from alter_peft.benchmark.methods import METHODS
from alter_peft.cli import main
from alter_peft.evaluation import Key, Pair, Scores, score_answers
from alter_peft.evaluation.results import Result


@pytest.fixture
def folder(tmp_path):
    return make_benchmark(tmp_path / "out")


def test_report_beside_the_results(folder, capsys):
    main(["report", str(folder)])
    out = capsys.readouterr().out
    assert out.startswith("- Mean distance to the oracles ") and "\n\n| criterion | alter (2 seeds) |" in out
    assert "\n\n| model | mean distance |" in out and " | 0.120 ± 0.014 |" in out
    assert out.endswith(f"\n\nreport: {folder / 'report.html'}\n")
    assert {"report.html", "report.md", "plane.png"} <= {path.name for path in folder.iterdir()}


def test_report_elsewhere(folder, tmp_path):
    before = sorted(folder.iterdir())
    output = tmp_path / "the report"
    main(["report", str(folder), "--output_dir", str(output)])
    assert sorted(folder.iterdir()) == before and (output / "plane.png").is_file()
    assert f"Made by `alter-peft report {folder} --output_dir '{output}'`." in (output / "report.md").read_text()


def test_bad_input_ends_with_code_2_and_one_line(folder, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    other = make_benchmark(tmp_path / "other")
    save(other, "alter", 0, scores=scores(0.1, 0.5), curves={})
    for path in other.glob("oracle-*/result.json"):
        path.unlink()
    for argv, name in (
        ([str(tmp_path / "nowhere")], "`folder`"),
        ([str(tmp_path)], "result.json"),
        ([str(other)], "no oracle"),
        ([str(folder), "--output_dir", str(file)], "`--output_dir`"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", *argv])
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert name in err and err.startswith("alter-peft report: error: ") and err.count("\n") == 1 and not out
    assert not list(other.glob("*.png"))


def test_without_a_folder(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2 and "folder" in capsys.readouterr().err


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setattr("alter_peft.options.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder)])
    assert ended.value.code == 2 and "pip install alter-peft[eval]" in capsys.readouterr().err


# ---- evaluate -------------------------------------------------------------------------------------------------------


FORGET = [{"prompt": "Where does Alice live?", "completion": "In Paris.", "wrong": ["In Rome.", "In Oslo."]}]
RETAIN = [{"prompt": "What is the sky?", "completion": "Blue."}, {"prompt": "Who bakes?", "completion": "Bob."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, an adapter, rows and TOFU."""
    folder = tmp_path_factory.mktemp("place")
    make_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_llama(len(tokenizer)), config).save_pretrained(folder / "adapter")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tofu(folder / "tofu")
    return folder


def ask(place, output, *more: str) -> list[str]:
    sets = ["--sets", f"forget={place / 'forget.jsonl'}", f"retain={place / 'retain.jsonl'}", "--forget", "forget"]
    own = ["--model", str(place / "model"), "--output_file", str(output), "--max_new_tokens", "4", "--bf16", "false"]
    return ["evaluate", *own, *sets, *more]


def test_evaluate_with_and_without_an_adapter(place, tmp_path, capsys, tokenizer):
    pairs = [Pair(row["prompt"], row["completion"]) for row in RETAIN]
    expected = score_answers(make_llama(len(tokenizer)), tokenizer, pairs).probability
    main(ask(place, tmp_path / "base.json"))
    out = capsys.readouterr().out
    assert out.startswith("| score | value |") and out.endswith(f"scores: {tmp_path / 'base.json'}\n")
    assert "\nprobability: arithmetic mean over rows, as TOFU's; `alter-peft unlearn` prints the geometric" in out
    base = Result.load(tmp_path / "base.json")
    assert base.name == "model" and base.scores[Key("retain", "probability")].rows == pytest.approx(expected, rel=1e-4)
    assert set(base.scores) == {Key(name, m) for name in ("forget", "retain") for m in ("probability", "rouge")}
    main(ask(place, tmp_path / "adapted.json", "--adapter", str(place / "adapter"), "--metrics", "probability"))
    adapted = Result.load(tmp_path / "adapted.json")
    assert adapted.name == "adapter" and adapted.scores[Key("retain", "probability")].rows != pytest.approx(
        expected, rel=1e-2
    )
    assert adapted.settings["metrics"] == ["probability"]


def test_evaluate_beside_oracles_and_under_attack(place, tmp_path, capsys):
    main(ask(place, tmp_path / "plain.json"))
    plain = Result.load(tmp_path / "plain.json")
    capsys.readouterr()
    for number, values in enumerate(([0.1, 0.3], [0.2, 0.4])):
        score = replace(plain.scores[Key("retain", "probability")], value=sum(values) / 2, rows=values)
        replace(plain, name="oracle", seed=number, scores=Scores([score])).save(tmp_path / f"{number}.json")
    oracles = ["--oracles", str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    main(ask(place, tmp_path / "x.json", *oracles, "--attacks", "switching_off", "--adapter", str(place / "adapter")))
    out = capsys.readouterr().out
    assert (
        out.startswith("| score | value | mean of the oracles | unit | distance |") and "| 0.250 | 0.071 | -3." in out
    )
    assert Key("forget", "probability", "switching_off") in Result.load(tmp_path / "x.json").scores


def test_evaluate_on_tofu(place, tmp_path):
    own = ["--model", str(place / "model"), "--output_file", str(tmp_path / "x.json"), "--max_new_tokens", "2"]
    main(["evaluate", *own, "--tofu", str(place / "tofu")])
    assert {Key("forget", "truth_ratio"), Key("utility", "model_utility")} <= set(
        Result.load(tmp_path / "x.json").scores
    )


def test_what_evaluate_refuses(place, tmp_path, capsys):
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text('{"prompt": "Who?"}\n')
    bare = ["evaluate", "--model", str(place / "model"), "--output_file", str(tmp_path / "x.json")]
    for argv, message in (
        (bare, "`--sets`, `--tofu`, `--books`, `--hazard`, `--tasks` and `--task_data` are all unset"),
        ([*bare, "--sets", "forget"], "entries name=source"),
        ([*bare, "--sets", f"a={tmp_path / 'none.jsonl'}"], "there is no such file"),
        ([*bare, "--sets", f"a={empty}"], "is empty (0 bytes)"),
        ([*bare, "--sets", f"a={broken}"], "has the columns ['prompt'], which name no known format"),
        (ask(place, "x", "--metrics", "bleurt"), "`--metrics` has ['bleurt']"),
        (ask(place, "x", "--attacks", "rude"), "`--attacks` has ['rude']"),
        (ask(place, "x", "--forget", "world"), "`--forget` is given twice"),
        ([*bare, "--sets", f"a={broken}", "--forget", "world"], "`--forget` has ['world'], but the `--sets` are"),
        (ask(place, "x", "--oracles", "one.json"), "`--oracles` has one result"),
        ([*bare, "--tofu", str(tmp_path / "nowhere")], "nowhere"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and message in err and err.count("\n") == 1, (argv, err)
    assert not (tmp_path / "x.json").exists()


# ---- benchmark ------------------------------------------------------------------------------------------------------


def random_adapter(model, tokenizer, data, folder, seed, options):
    """A method that takes no time."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted


def out_of_luck(model, tokenizer, data, folder, seed, options):
    raise RuntimeError("no such luck")


@pytest.fixture
def grid(place, tmp_path, monkeypatch):
    """A small grid as a YAML file, and its folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(METHODS, "lora_ga", SimpleNamespace(run=random_adapter, trainer=UnlearnTrainer, options={}))
    monkeypatch.setitem(METHODS, "lora_npo", SimpleNamespace(run=out_of_luck, trainer=UnlearnTrainer, options={}))
    teach = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "disable_tqdm": True}
    options = {
        "model": str(place / "model"), "data": str(place / "tofu"), "methods": ["lora_ga"], "oracle_seeds": [0, 1],
        "max_new_tokens": 2, "answered": 2, "rows": 2, "options": {"teach": teach},
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(options))  # JSON is YAML
    return tmp_path / "grid.yaml", tmp_path / "out"


def test_benchmark_by_a_yaml_file(grid, capsys):
    """The whole way."""
    options, out = grid
    main(["benchmark", "--config", str(options), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert "| lora_ga | " in printed and printed.endswith(f"report: {out / 'report.html'}\n")
    assert f"alter-peft benchmark --config {options}" in (out / "report.md").read_text()


def test_an_adapter_of_ones_own_joins_a_grid(grid, place, capsys):
    options, out = grid
    main(["benchmark", "--config", str(options), "--output_dir", str(out)])
    own = ["--model", str(out / "target" / "model"), "--adapter", str(place / "adapter"), "--max_new_tokens", "2"]
    own += ["--tofu", str(place / "tofu"), "--answered", "2", "--name", "mine", "--seed", "3"]
    own += ["--output_file", str(out / "mine-3" / "result.json")]
    main(["evaluate", *own, "--rows", "2"])  # an adapter of one's own joins the grid
    main(["report", str(out)])
    assert "| mine | " in capsys.readouterr().out and Result.load(out / "mine-3" / "result.json").seed == 3
    main(["evaluate", *own])
    with pytest.raises(SystemExit) as ended:
        main(["report", str(out)])
    assert ended.value.code == 2 and ": rows is 2 in " in capsys.readouterr().err


def test_a_benchmark_with_failed_cells_ends_with_code_1(grid, capsys):
    options, out = grid
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--config", str(options), "--output_dir", str(out), "--methods", "lora_ga", "lora_npo"])
    printed, errors = capsys.readouterr()
    assert ended.value.code == 1 and (out / "report.html").is_file() and "| lora_ga | " in printed
    last = errors.splitlines()[-1]
    assert last == "1 of 5 cells failed: lora_npo of seed 0: RuntimeError: no such luck"
    (out / "copy").mkdir()
    for text, reason in ((None, "is a second cell of target with seed 0"), ("{", "is no result (")):
        (out / "copy" / "result.json").write_text(text or (out / "target" / "result.json").read_text())
        with pytest.raises(SystemExit) as ended:
            main(["benchmark", "--config", str(options), "--output_dir", str(out), "--methods", "lora_ga", "lora_npo"])
        printed, errors = capsys.readouterr()
        *_, failures, fault = errors.splitlines()
        assert ended.value.code == 1 and failures == last and reason in fault and "no distances" not in errors


def test_a_cell_that_another_run_is_at_is_one_line(grid, capsys):
    options, out = grid
    (out / "target").mkdir(parents=True)
    with FileLock(out / "target" / ".lock"), pytest.raises(SystemExit) as ended:
        main(["benchmark", "--config", str(options), "--output_dir", str(out)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("alter-peft benchmark: error: Another run is at work")


@pytest.mark.parametrize("fault", ["one failed", "alike"])
def test_without_oracles_to_compare_with_the_scores_are_printed(grid, capsys, monkeypatch, fault):
    """And no traceback, after hours."""
    taught = cells.teach

    def teach(model, tokenizer, rows, folder, seed, *args, **options):
        if fault == "one failed" and folder.parent.name == "oracle-1":
            raise RuntimeError("no such luck")
        return taught(model, tokenizer, rows, folder, 0, *args, **options)

    monkeypatch.setattr(cells, "teach", teach)
    options, out = grid
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--config", str(options), "--output_dir", str(out)])
    printed, errors = capsys.readouterr()
    assert ended.value.code == 1 and "| forget/probability | " in printed
    assert printed.count("| score | target | oracle") == 1 and not (out / "report.html").exists()
    reason = "has 1 measured oracles; seed 1 failed" if fault == "one failed" else "do not differ in any score"
    assert "There are no distances and no report: " in errors and reason in errors
    assert ("1 of 4 cells failed: oracle of seed 1" in errors) == (fault == "one failed")


def test_what_benchmark_refuses(place, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--model", "m", "--output_dir", str(tmp_path), "--methods", "alters"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "`--methods` has ['alters']" in err and err.count("\n") == 1
