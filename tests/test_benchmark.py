# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_llama
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from tiny_tofu import write_tofu

from alter_peft import UnlearnConfig, UnlearnTrainer
from alter_peft.benchmark import cell as cells
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.benchmark.methods import METHODS
from alter_peft.benchmark.methods import reading as methods
from alter_peft.benchmark.provenance import CONTENT, check_made_with
from alter_peft.evaluation import Key, Score, Scores
from alter_peft.evaluation.attacks import Attack
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.seen_tokens import SeenTokens
from alter_peft.evaluation.tasks import tofu


calls: list[tuple[str, int]] = []
FORGET = Key("forget", "probability")
FAKE = Score("forget", "probability", 0.5, [0.5], attack="fake")


def random_adapter(model, tokenizer, data, folder, seed, options):
    """A method that takes no time: random LoRA weights."""
    calls.append(("random", seed))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted


def broken(model, tokenizer, data, folder, seed, options):
    calls.append(("broken", seed))
    raise RuntimeError("no such luck")


def stop_at_once(*args):
    raise KeyboardInterrupt


def fake_attack(model, tokenizer, rows):
    calls.append(("attack", len(rows.forget)))
    return [FAKE]


def run_benchmark(args) -> list[Result]:
    return Grid(args).run()


def as_attacks(monkeypatch, **attacks) -> dict[str, Attack]:
    """These instead of `ATTACKS`."""
    entries = {name: Attack(run=run, caption=name) for name, run in attacks.items()}
    for module in ("benchmark.grid", "evaluation.arguments"):
        monkeypatch.setattr(f"alter_peft.{module}.ATTACKS", entries)
    monkeypatch.setattr("alter_peft.evaluation.attacks.ATTACKS", entries)
    return entries


def as_method(run) -> SimpleNamespace:
    """An entry of METHODS that does this."""
    return SimpleNamespace(run=run, trainer=UnlearnTrainer, options={})


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_tofu(folder / "tofu")
    return folder


@pytest.fixture
def arguments(base, tmp_path, monkeypatch):
    """Arguments of a grid of quick methods, counted in `calls`."""
    calls.clear()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(methods, "METHODS", {"random": as_method(random_adapter), "broken": as_method(broken)})
    as_attacks(monkeypatch, fake=fake_attack)
    original = cells.teach

    def counted(model, tokenizer, rows, folder, *others, **options):
        calls.append((folder.parent.name, len(rows)))
        return original(model, tokenizer, rows, folder, *others, disable_tqdm=True, **options)

    monkeypatch.setattr(cells, "teach", counted)

    def make(**changes):
        usual = {
            "model": str(base / "model"), "data": str(base / "tofu"), "output_dir": str(tmp_path / "out"),
            "oracle_seeds": [0, 1], "methods": ["random"], "max_new_tokens": 4, "retain_rows": 6,
            "options": {"teach": {"max_steps": 1}},
        }  # fmt: skip
        return BenchmarkArguments(**{**usual, **changes})

    return make


@pytest.fixture
def quick(monkeypatch):
    """One score instead of TOFU's, the probability of the forget set."""
    monkeypatch.setattr(tofu, "TOFU_METRICS", {"forget": ("probability",)})
    monkeypatch.setattr(tofu.TofuData, "computed_scores", lambda data, scores: [])
    monkeypatch.setattr(tofu, "GUARDED", ())
    original = tofu.TofuData.question_sets.fget
    sets = property(lambda data: original(replace(data, sets={"forget": data.sets["forget"]})))
    monkeypatch.setattr(tofu.TofuData, "question_sets", sets)


def test_every_cell_is_measured_once(arguments, tmp_path):
    results = run_benchmark(arguments(seeds=[3, 4]))
    assert [(r.name, r.seed, r.error) for r in results] == [
        ("target", 0, None), ("oracle", 0, None), ("oracle", 1, None), ("random", 3, None), ("random", 4, None),
    ]  # fmt: skip
    assert calls == [("target", 16), ("oracle-0", 12), ("oracle-1", 12), ("random", 3), ("random", 4)]
    for result, folder in zip(results, ("target", "oracle-0", "oracle-1", "random-3", "random-4"), strict=True):
        assert Result.load(tmp_path / "out" / folder / "result.json") == result
        assert set(result.seconds) == {"training", "evaluation"} and result.settings["split"] == "forget01"
    first, second = (result.scores[FORGET].rows for result in results[3:])
    assert len(first) == 4 and first != second
    calls.clear()
    assert run_benchmark(arguments(seeds=[3, 4])) == results and calls == []


def test_methods_seeds_tasks_and_attacks_join_later(arguments, quick, monkeypatch, tmp_path):
    before = run_benchmark(arguments())
    calls.clear()
    asked = Score("mcq", "acc", 0.25, [0.0, 0.0, 0.0, 1.0])
    task = str(tmp_path / "mcq.jsonl")
    Path(task).write_text(json.dumps({"question": "Who?", "choices": ["Bob", "Eve"], "answer": 0}))
    monkeypatch.setattr("alter_peft.evaluation.tasks.choices.ChoiceData.other_scores", lambda *args: [asked])
    after = run_benchmark(arguments(seeds=[0, 1], attacks=["fake"], tasks=[task]))
    assert calls == [("attack", 4)] * 4 + [("random", 1), ("attack", 4)]
    for old, new in zip(before, after, strict=False):
        assert new.scores == {**old.scores, FAKE.key: FAKE, asked.key: asked}
        assert {"attack: fake", f"task: {task}"} <= set(new.seconds)
    with pytest.raises(ValueError, match=r"`.*mcq.jsonl` is .*'limit': 3.* was made with .*'limit': None"):
        run_benchmark(arguments(tasks=[task], limit=3))
    assert run_benchmark(arguments(limit=3))  # no task is asked for, so that its limit does not matter


def test_variants_of_a_method_are_cells_with_options_of_their_own(arguments, quick, monkeypatch):
    seen = {}

    def record(model, tokenizer, data, folder, seed, options):
        seen[folder.name] = options
        return random_adapter(model, tokenizer, data, folder, seed, options)

    entry = SimpleNamespace(run=record, trainer=UnlearnTrainer, options={}, adapter=METHODS["lora_npo"].adapter)
    monkeypatch.setitem(methods.METHODS, "random", entry)
    options = {
        "random+mine": {"learning_rate": "1e-3", "adapter": {"r": 4}}, "random": {"max_steps": 2},
        "teach": {"max_steps": 1},
    }  # fmt: skip
    results = run_benchmark(arguments(methods=["random", "random+mine"], options=options))
    assert seen == {"random-0": {"max_steps": 2}, "random+mine-0": {"learning_rate": 1e-3, "adapter": {"r": 4}}}
    assert [result.name for result in results[3:]] == ["random", "random+mine"]
    assert results[4].settings["options"] == {"learning_rate": 1e-3, "adapter": {"r": 4}}
    for options, message in (
        ({"other+mine": {}}, r"`options` has \['other\+mine'\], but must be some of"),
        ({"random+": {}}, r"`options` has 'random\+', but a variant is named by"),
        ({"random+a/b": {}}, r"`options` has 'random\+a/b', but a variant is named by"),
        (
            {"random+mine": {"adapter": {"rank": 4}}},
            r"`options` for 'random\+mine' have `adapter` .* is refused: .*rank",
        ),
        ({"random+mine": {"adapter": 4}}, r"`options` for 'random\+mine' have `adapter` 4, but must have"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(options=options)


def test_a_failed_cell_says_so_and_is_tried_again(arguments, quick, monkeypatch):
    results = run_benchmark(arguments(methods=["broken", "random"]))
    assert results[3].error == "RuntimeError: no such luck" and results[3].scores == {}
    assert results[4].error is None and results[4].scores
    calls.clear()
    monkeypatch.setitem(methods.METHODS, "broken", as_method(random_adapter))
    results = run_benchmark(arguments(methods=["broken", "random"]))
    assert results[3].error is None and results[3].scores and calls == [("random", 0)]


def test_a_failed_cell_can_be_corrected(arguments, quick, monkeypatch):
    """By other options: nothing that was measured is lost."""
    run_benchmark(arguments(methods=["broken"], options={"broken": {"learning_rate": 9.0}}))
    seen = []

    def mended(model, tokenizer, data, folder, seed, options):
        seen.append(options)
        return random_adapter(model, tokenizer, data, folder, seed, options)

    monkeypatch.setitem(methods.METHODS, "broken", as_method(mended))
    path = Path(arguments().output_dir) / "broken-0" / "result.json"
    failed = Result.load(path)
    failed.seconds = {"training": 3.0}  # it was trained: a NaN
    failed.scores = Scores([Score("retain", "probability", 0.5, step=0)])
    failed.save(path)
    options = {"broken": {"learning_rate": 1e-3}, "teach": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"`options` for 'teach' is {'max_steps': 1}, but .*target.result.json"):
        Grid(arguments(methods=["broken"], options=options))
    del options["teach"]
    result = run_benchmark(arguments(methods=["broken"], options=options))[-1]
    assert seen == [{"learning_rate": 1e-3}] and result.error is None and result.scores
    assert result.settings["options"] == {"learning_rate": 1e-3} and not result.scores.after_requests
    message = r"`options` for 'broken' is {}, but .* or remove the folder .*broken-0\."
    with pytest.raises(ValueError, match=message):
        Grid(arguments(methods=["broken"], options={}))


def test_a_target_that_failed_can_be_taught_otherwise(arguments, quick, monkeypatch, tmp_path):
    def refuse(*args):
        raise ValueError("NaN")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="NaN"):
        patch.setattr(cells, "measure_task", refuse)
        run_benchmark(arguments())
    assert (tmp_path / "out" / "target" / "model" / "config.json").is_file()
    calls.clear()
    target = run_benchmark(arguments(options={"teach": {"max_steps": 2}}))[0]
    assert calls[0] == ("target", 16) and target.settings["options"] == {"max_steps": 2} and target.error is None
    record = json.loads((tmp_path / "out" / "target" / "model" / "taught.json").read_text())
    assert record["options"] == {"max_steps": 2} and record["retain_rows"] == 6


def test_what_was_trained_is_not_trained_again(arguments, quick, monkeypatch):
    """A run that stopped while it measured."""

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "measure_task", stop_at_once)
        run_benchmark(arguments())
    assert calls == [("target", 16)]
    with pytest.raises(ValueError, match=r"`options` for 'teach' is {'max_steps': 2}, but .*target.result.json"):
        Grid(arguments(options={"teach": {"max_steps": 2}}))  # it has weights, which no error speaks against
    stopped = cells.measure_task
    count = []

    def later(*args):
        count.append(1)
        if len(count) == 4:  # the method's
            raise KeyboardInterrupt
        return stopped(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "measure_task", later)
        run_benchmark(arguments())
    assert calls == [("target", 16), ("oracle-0", 12), ("oracle-1", 12), ("random", 0)]
    unmeasured = Result.load(Path(arguments().output_dir) / "random-0" / "result.json")
    assert unmeasured.error == "stopped before: evaluation" and unmeasured.seconds["training"] > 0
    calls.clear()
    results = run_benchmark(arguments())
    assert calls == [] and all(result.error is None and result.scores for result in results)
    assert results[3].seconds["training"] == unmeasured.seconds["training"]


def test_one_failed_attack_leaves_the_others_alone(arguments, quick, monkeypatch):
    def fail(model, tokenizer, rows):
        raise RuntimeError("a fault")

    as_attacks(monkeypatch, bad=fail, fake=fake_attack)
    for result in run_benchmark(arguments(attacks=["bad", "fake"])):
        assert result.error == "RuntimeError: a fault" and result.scores[FAKE.key] == FAKE
        assert FORGET in result.scores and "attack: bad" not in result.seconds
    bad = replace(FAKE, attack="bad")
    as_attacks(monkeypatch, bad=lambda model, tokenizer, rows: [bad], fake=fake_attack)
    for result in run_benchmark(arguments(attacks=["bad", "fake"])):
        assert result.error is None and result.scores[bad.key] == bad


def test_a_cell_that_stopped_says_before_what(arguments, quick, monkeypatch):
    """Also one that was whole, while an attack joins it."""

    run_benchmark(arguments())
    as_attacks(monkeypatch, fake=fake_attack, slow=stop_at_once)
    path = Path(arguments().output_dir) / "target" / "result.json"
    for wanted, left in ((["slow", "fake"], "attack: slow, attack: fake"), (["fake", "slow"], "attack: slow")):
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(arguments(attacks=wanted))
        stopped = Result.load(path)
        assert stopped.error == f"stopped before: {left}" and stopped.scores[FORGET].rows
    as_attacks(monkeypatch, fake=fake_attack, slow=lambda model, tokenizer, rows: [replace(FAKE, attack="slow")])
    assert run_benchmark(arguments(attacks=["fake", "slow"]))[0].error is None and Result.load(path).error is None


def test_seen_tokens_that_fail_lose_no_scores(arguments, quick, monkeypatch, tmp_path):
    """They are measured by the next run."""
    astray = Scores([Score("forget", "probability", 0.5, [0.5]), Score("forget", "astray", 0.0, [0.0])])
    monkeypatch.setattr(cells, "measure_task", lambda *args: astray)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "observe_tokens", stop_at_once)
        run_benchmark(arguments())
    path = tmp_path / "out" / "target" / "result.json"
    stopped = Result.load(path)
    assert stopped.scores == astray and stopped.error == "stopped before: seen tokens"
    monkeypatch.setattr(cells, "observe_tokens", lambda *args: 1 / 0)
    assert all(result.error.startswith("ZeroDivisionError") for result in run_benchmark(arguments()))
    calls.clear()
    found = SimpleNamespace(save=lambda path: path.write_text("what was seen"))
    monkeypatch.setattr(cells, "observe_tokens", lambda *args: found)
    results = run_benchmark(arguments())
    assert calls == [] and all(result.scores == astray and result.error is None for result in results)
    assert [one.read_text() for one in path.parent.parent.glob("*/tokens.json")] == ["what was seen"] * len(results)


def test_each_part_has_its_machine(arguments, quick, monkeypatch):
    monkeypatch.setattr(cells, "machine", lambda: "a laptop, 2 threads")
    run_benchmark(arguments())
    monkeypatch.setattr(cells, "machine", lambda: "a server, 8 threads")
    result = run_benchmark(arguments(attacks=["fake"]))[-1]
    laptop, server = "a laptop, 2 threads", "a server, 8 threads"
    assert result.machines == {"training": laptop, "evaluation": laptop, "attack: fake": server}
    assert result.machine == laptop and result.machines.keys() == result.seconds.keys()


def test_two_runs_of_one_grid_do_not_work_on_one_cell(arguments, quick):
    """But on different ones, on a target that both use."""
    run_benchmark(arguments(methods=["broken"]))
    with FileLock(Path(arguments().output_dir) / "broken-0" / ".lock"):
        assert run_benchmark(arguments(methods=["random"]))[-1].scores
        calls.clear()
        with pytest.raises(BlockingIOError, match=r"Another run is at work on '.*broken-0'"):
            run_benchmark(arguments(methods=["broken"]))
        assert calls == []


def test_a_score_that_is_no_number_is_measured_anew(arguments, quick):
    results = run_benchmark(arguments(attacks=["fake"]))
    for folder in ("random-0", "oracle-1"):
        broken = Result.load(Path(arguments().output_dir) / folder / "result.json")
        broken.scores[FORGET] = Score(*FORGET[:2], float("nan"))
        broken.environment = {}
        broken.save(Path(arguments().output_dir) / folder / "result.json")
    calls.clear()
    again = run_benchmark(arguments(attacks=["fake"]))
    assert calls == [("attack", 4)] * 2  # nothing is trained
    assert [result.scores for result in again] == [result.scores for result in results]
    assert all(result.environment["peft"] for result in again)


@pytest.mark.parametrize("where", ["value", "row"])
def test_a_score_that_stays_no_number_is_a_failed_cell(arguments, quick, monkeypatch, where):
    bad = Score("forget", "probability", float("nan") if where == "value" else 0.5, [float("inf")])
    monkeypatch.setattr(cells, "measure_task", lambda *args: Scores([bad]))
    assert all(result.error.startswith("`forget/probability` is ") for result in run_benchmark(arguments()))
    calls.clear()
    changed = {"teach": {"max_steps": 1}, "random": {"learning_rate": 1e-3}}
    run_benchmark(arguments(options=changed))  # as of any cell that failed: it is trained anew by other options
    assert calls == [("random", 0)]


def test_requests_are_made_again_where_a_score_of_theirs_is_broken(arguments, quick, monkeypatch):
    made = []

    def one_a_request(model, tokenizer, data, folder, seed, options):
        made.append(folder.name)
        adapted = (
            random_adapter(model, tokenizer, data, folder, seed, options) if folder.name == "request-1" else model
        )
        adapted.save_pretrained(folder)
        return adapted

    monkeypatch.setitem(methods.METHODS, "random", as_method(one_a_request))
    whole = run_benchmark(arguments(requests=2))[-1]
    path = Path(arguments().output_dir) / "random-0" / "result.json"
    broken = Result.load(path)
    key = Key("request 1", "probability", step=2)
    broken.scores[key] = replace(broken.scores[key], value=float("nan"))
    broken.save(path)
    made.clear()
    again = run_benchmark(arguments(requests=2))[-1]
    assert made == ["request-1", "request-2"] and again.error is None
    assert {key: score.value for key, score in again.scores.items()} == {
        key: score.value for key, score in whole.scores.items()
    }


def test_plain_text_is_taught_unlearned_and_attacked_as_plain_text(arguments, quick, monkeypatch):
    seen = []

    def record(model, tokenizer, data, folder, seed, options):
        seen.append(data.as_chat)
        return random_adapter(model, tokenizer, data, folder, seed, options)

    def look(model, tokenizer, rows):
        seen.append(tokenizer.chat_template)
        return [FAKE]

    as_attacks(monkeypatch, fake=look)
    monkeypatch.setitem(methods.METHODS, "random", as_method(record))
    monkeypatch.setattr(tofu.TofuData, "as_chat", False)
    taught = cells.teach
    monkeypatch.setattr(cells, "teach", lambda *args, **options: [seen.append(args[6]), taught(*args, **options)][1])
    run_benchmark(arguments(attacks=["fake"]))
    assert seen == [False, None, False, None, False, None, False, None]


def test_a_broken_model_is_a_row_that_says_so(arguments, quick, monkeypatch):
    def overflow(model, tokenizer, data, folder, seed, options):
        adapted = random_adapter(model, tokenizer, data, folder, seed, options)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(float("nan"))
        adapted.save_pretrained(folder)

    monkeypatch.setitem(methods.METHODS, "random", as_method(overflow))
    result = run_benchmark(arguments())[-1]
    assert result.scores == {} and "gives log-probabilities that are NaN" in result.error


def test_a_model_whose_head_is_not_known_is_not_scored(arguments, quick, monkeypatch):
    def refuse(model):
        raise ValueError("no such head")

    monkeypatch.setattr(cells.ScoredModel, "check", refuse)
    with pytest.raises(ValueError, match="no such head"):
        run_benchmark(arguments())


def test_a_target_that_fails_ends_the_run(arguments, quick, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(cells, "measure_task", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run_benchmark(arguments())


def test_a_target_may_be_given(arguments, quick, tmp_path):
    results = run_benchmark(arguments(output_dir=str(tmp_path / "first")))
    calls.clear()
    target = str(tmp_path / "first" / "target" / "model")
    again = run_benchmark(arguments(target=target))
    assert ("target", 16) not in calls and again[0].scores == results[0].scores
    assert again[0].environment["torch"] and again[0].machine


def test_requests_one_after_another(arguments, quick, monkeypatch):
    given = []

    def record(model, tokenizer, data, folder, seed, options):
        given.append((folder.name, data.forget["prompt"][:]))
        return random_adapter(model, tokenizer, data, folder, seed, options) if len(given) == 1 else model

    monkeypatch.setitem(methods.METHODS, "random", as_method(record))
    result = run_benchmark(arguments(requests=2))[-1]
    assert [name for name, _ in given] == ["request-1", "request-2"] and len(given[0][1]) == len(given[1][1]) == 2
    assert result.scores[FORGET].rows
    for name in ("request 1", "retain", "real_authors", "world_facts", "utility"):
        assert [key.step for key in result.scores.after_requests if key.set == name] == [0, 1, 2]


def test_finished_requests_are_not_made_again(arguments, quick, monkeypatch):
    def first_alone(model, tokenizer, data, folder, seed, options):
        calls.append(("request", folder.name))
        adapted = random_adapter(model, tokenizer, data, folder, seed, options) if "1" in folder.name else model
        adapted.save_pretrained(folder)
        return adapted

    monkeypatch.setitem(methods.METHODS, "random", as_method(first_alone))
    with monkeypatch.context() as patch:
        patch.setattr(cells, "measure_task", lambda *args: Scores([Score(*FORGET[:2], float("nan"))]))
        broken = run_benchmark(arguments(requests=2))[-1]
    calls.clear()
    result = run_benchmark(arguments(requests=2))[-1]
    assert calls == [] and result.error is None and result.scores[FORGET].rows
    assert (
        result.scores.after_requests == broken.scores.after_requests
        and result.seconds["training"] == broken.seconds["training"]
    )


def test_options_of_yaml_are_numbers(arguments):
    """To YAML 5e-4 is a text, and one value no list."""
    options = {"random": {"learning_rate": "5e-4", "max_steps": -1}, "teach": {"num_train_epochs": "2"}}
    found = arguments(options=options, seeds=3, max_new_tokens="7")
    assert found.options["random"] == {"learning_rate": 5e-4, "max_steps": -1}
    assert found.options["teach"] == {"num_train_epochs": 2} and found.seeds == [3] and found.max_new_tokens == 7


def test_requests_go_on_where_they_stopped(arguments, quick, monkeypatch):
    def stop(model, tokenizer, data, folder, seed, options):
        if folder.name == "request-2" and not calls[-1:] == [("again", 0)]:
            raise KeyboardInterrupt
        calls.append(("request", int(folder.name[-1])))
        adapted = random_adapter(model, tokenizer, data, folder, seed, options) if "1" in folder.name else model
        adapted.save_pretrained(folder)
        return adapted

    monkeypatch.setitem(methods.METHODS, "random", as_method(stop))
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(arguments(requests=2))
    stopped = Result.load(Path(arguments().output_dir) / "random-0" / "result.json")
    assert stopped.error == "stopped before: requests 2 to 2, evaluation"
    assert [key.step for key in stopped.scores if key.set == "request 2"] == [0, 1] and not stopped.failed
    with pytest.raises(ValueError, match=r"`options` for 'random' is {'max_steps': 3}, but .*random-0.result.json"):
        Grid(arguments(requests=2, options={"teach": {"max_steps": 1}, "random": {"max_steps": 3}}))
    calls.append(("again", 0))
    result = run_benchmark(arguments(requests=2))[-1]
    assert calls[-1] == ("request", 2) and result.error is None and result.scores
    assert all(result.scores[key] == score for key, score in stopped.scores.items())
    assert result.seconds["training"] > stopped.seconds["training"] > 0


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_results_of_other_settings_are_refused(arguments, quick):
    run_benchmark(arguments())
    with pytest.raises(ValueError, match=r"`retain_rows` is 4, but .*target.result.json was made with 6\. Choose ano"):
        run_benchmark(arguments(retain_rows=4))
    options = {"teach": {"num_train_epochs": 2}}
    with pytest.raises(ValueError, match=r"`options` for 'teach' is {'num_train_epochs': 2}, but"):
        run_benchmark(arguments(options=options))


def test_a_cell_of_another_default_loss_is_not_gone_on_with(arguments, quick, monkeypatch):
    args = arguments()
    run_benchmark(args)
    path = Path(args.output_dir) / "random-0" / "result.json"
    assert Result.load(path).settings["forget_loss"] == UnlearnConfig.forget_loss == "soft_targets"
    monkeypatch.setattr(UnlearnConfig, "forget_loss", "tokens")
    with pytest.raises(ValueError, match=r"`forget_loss` is 'tokens', but .*random-0.result.json was made with 'soft"):
        run_benchmark(args)


def test_a_grid_that_knew_no_bystanders_is_not_gone_on_with(arguments, quick):
    """Its target and oracles were never taught them; where none are left of the retain rows it is as it was."""
    args = arguments()
    assert {one.settings["bystander_rows"] for one in run_benchmark(args)} == {6}
    file = Path(args.output_dir) / "target" / "result.json"
    earlier = json.loads(file.read_text())
    del earlier["settings"]["bystander_rows"]
    file.write_text(json.dumps(earlier))
    with pytest.raises(
        ValueError, match=r"`bystander_rows` is 6, but .*target.result.json was made with None\. Choose"
    ):
        Grid(arguments())
    assert all(
        cell.settings["bystander_rows"] is None for cell in Grid(arguments(retain_rows=None, output_dir="x")).cells
    )


def test_rows_that_changed_in_their_file_are_refused(arguments, base, tmp_path):
    """Of a result as of taught weights; nothing is known of the rows of older ones."""
    data = tmp_path / "tofu"
    shutil.copytree(base / "tofu", data)
    run_benchmark(arguments(data=str(data)))
    for name in ("retain99", "retain_perturbed"):
        file = data / f"{name}.jsonl"
        file.write_text(file.read_text().replace(" man.", " woman."))
    result = tmp_path / "out" / "target" / "result.json"
    message = r"The set 'retain' of `data` is 6 rows \(\w+\), but .*{} was made with 6 rows \(\w+\): .* Choose another"
    with pytest.raises(ValueError, match=message.format("result.json")):
        Grid(arguments(data=str(data)))
    found = json.loads(result.read_text())
    del found["settings"]["content"]
    result.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message.format("taught.json")):
        Grid(arguments(data=str(data)))


@pytest.mark.parametrize(
    "now, before, found",
    [("none", "6 rows \\(b\\)", {"bystanders": "6 rows (b)"}), ("6 rows \\(b\\)", "none", {})],
)
def test_a_set_that_is_gone_or_new_is_a_change(now, before, found):
    """Also where no row of the others changed."""
    forget, wanted = {"forget": "2 rows (a)"}, {} if found else {"bystanders": "6 rows (b)"}
    path = Path("out/random-0/result.json")
    with pytest.raises(ValueError, match=f"The set 'bystanders' of `data` is {now}, but .* was made with {before}: "):
        check_made_with("random", path, {CONTENT: {**forget, **found}}, {CONTENT: {**forget, **wanted}})
    check_made_with("random", path, {}, {CONTENT: {**forget, **wanted}})  # of an older version


def test_a_method_on_another_target_is_refused(arguments, quick, tmp_path):
    """The folders of target and oracles were removed, as the error says, to teach them otherwise."""
    run_benchmark(arguments())
    out = tmp_path / "out"
    for name in ("target", "oracle-0", "oracle-1"):
        shutil.rmtree(out / name)
    changed = arguments(options={"teach": {"max_steps": 2}})
    message = r"`options` for 'teach' is {'max_steps': 2}, but .*random-0.result.json was made with {'max_steps': 1}"
    with pytest.raises(ValueError, match=rf"{message}.* remove the folder .*random-0\."):
        Grid(changed)


@pytest.mark.parametrize("name", ["target", "oracle-1"])
def test_a_model_that_was_taught_otherwise_is_not_taken(arguments, quick, tmp_path, name):
    """It stands there without a result: the run had stopped, or someone has copied it."""
    run_benchmark(arguments())
    out = tmp_path / "out"
    for folder in out.iterdir():
        (folder / "result.json").unlink()
        if folder.name != name:
            shutil.rmtree(folder)
    changed = arguments(options={"teach": {"max_steps": 2}})
    with pytest.raises(ValueError, match=rf"`options` for 'teach' is .*{name}.model.taught.json was made with"):
        Grid(changed)
    with pytest.raises(ValueError, match=rf"`retain_rows` is 4, but .*taught.json was made with 6.*{name}\."):
        Grid(arguments(retain_rows=4))
    calls.clear()
    run_benchmark(arguments())
    assert (name, 16 if name == "target" else 12) not in calls and len(calls) == 3


def test_another_rate_of_relearning_is_refused_where_one_was_measured(arguments, quick, monkeypatch):
    as_attacks(monkeypatch, relearning=fake_attack)
    run_benchmark(arguments(relearning_rate=1e-3))  # nothing is relearned
    run_benchmark(arguments(attacks=["relearning"]))
    with pytest.raises(ValueError, match=r"`relearning_rate` is 0.001, but .*target.result.json was made with 0.0001"):
        Grid(arguments(attacks=["relearning"], relearning_rate=1e-3))
    assert Grid(arguments(relearning_rate=1e-3)).cells[0].setting.rows.relearning_rate == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relearning_rate": 0.0}, "`relearning_rate` is 0.0, but must be above 0"),
        ({"methods": []}, "`methods` is empty"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"output_dir": __file__}, "`output_dir` is .*, but that is a file"),
        ({"options": ["random"]}, r"`options` is \['random'\], but must be method -> "),
        ({"options": {"random": 3}}, r"`options` is \{'random': 3\}, but must be method -> "),
        ({"options": {"random": {"seed": 3}}}, r"`options` has \['seed'\] for 'random', which the benchmark sets"),
        ({"tasks": ["a.jsonl", "b/a.jsonl"]}, "two of which have the same name"),
        ({"methods": ["alters"]}, r"`methods` has \['alters'\], but must be some of \['random', 'broken'\]"),
        ({"attacks": ["rude"]}, r"`attacks` has \['rude'\], but must be some of \['fake'\]"),
        ({"options": '{"lora": {}}'}, r"`options` has \['lora'\], but must be some of"),
        ({"options": "{"}, r"`options` is '\{', but must be a JSON object"),
        ({"options": {"random": {"num_epochs": 1}}}, r"`options` has \['num_epochs'\] for 'random', but those must"),
        (
            {"options": {"teach": {"lr_scheduler_type": "magic"}}},
            "`options` for 'teach' are .*, which SFTConfig refuses",
        ),
        (
            {"options": {"random": {"learning_rate": "high"}}},
            "`options` for 'random' are .*'high'.*, which UnlearnConfig refuses: `learning_rate` is 'high', but must",
        ),
        ({"options": {"random": {"learning_rate": -1}}}, "`learning_rate` is -1, but must be a finite number, 0"),
        ({"options": {"random": {"num_train_epochs": 0}}}, "`num_train_epochs` is 0, but must be above 0"),
        ({"options": {"teach": {"num_train_epochs": -1}}}, "'teach' .*`num_train_epochs` is -1, but must be above 0"),
        ({"options": {"random": {"max_steps": 0}}}, "`max_steps` is 0, but must be 1 or more, or -1"),
        (
            {"options": {"random": {"per_device_train_batch_size": 0}}},
            "`per_device_train_batch_size` is 0, but must be 1 or more",
        ),
        (
            {"options": {"teach": {"save_strategy": "epoch", "report_to": "all"}}},
            r"`options` has \['report_to', 'save_strategy'\] for 'teach', which the benchmark sets itself",
        ),
        ({"max_new_tokens": [3]}, r"`max_new_tokens` is \[3\], but must be int"),
        ({"books": 3}, "`books` is '3', but must be a JSON object"),
        ({"seeds": [0, -1]}, r"`seeds` has \[-1\], but must be from 0 to"),
        ({"requests": 0}, "`requests` is 0, but must be 1 or more"),
        ({"answered": 0}, "`answered` is 0, but must be 1 or more"),
        ({"books": {"forget": "a.txt"}, "rows": 3}, "`retain_rows` is set, but it is of TOFU alone"),
        (
            {"books": {"forget": "a"}, "retain_rows": None},
            "`data` is set, but it is of TOFU alone. Remove it or `books`",
        ),
        (
            {"task_data": {"books": {}}, "retain_rows": None, "data": "locuslab/TOFU", "attacks": ["fake"]},
            "`attacks` is set, but they are for questions forgotten at once. Remove it or `task_data`",
        ),
        (
            {"task_data": {"tofa": {}}},
            r"`task_data` has \['tofa'\], but must be some of \['tofu', 'books', 'choices', ",
        ),
        ({"task_data": {}}, r"`task_data` is {}, but a grid is of one task"),
        (
            {"task_data": {"choices": {"tasks": []}}, "books": {}},
            "but a grid is of one task. Give one, and no `books`",
        ),
        (
            {"task_data": {"tofu": {"folder": "x"}}, "retain_rows": None, "data": "locuslab/TOFU"},
            "must hold the arguments of its reader",
        ),
        (
            {"methods": ["random", "random+mine"], "options": {"random": {"max_steps": 2}}},
            r"`methods` has \['random\+mine'\], of which `options` says nothing, so that it would be 'random' by its",
        ),
        ({"oracle_seeds": [0, 0]}, r"`oracle_seeds` is \[0, 0\], but a benchmark needs 2 oracles at least"),
        ({"requests": 2, "attacks": ["fake"]}, "Remove it or `requests`"),
        ({"model": "nowhere"}, "`model` is 'nowhere', which could not be loaded"),
        ({"target": "nowhere"}, "`target` is 'nowhere', which could not be loaded"),
        ({"data": "nowhere"}, "`source` is 'nowhere'"),
        ({"requests": 3}, "`requests` is 3, which does not divide the 4 forget rows evenly"),
        ({"tasks": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ],
)
def test_unusable_arguments(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        Grid(arguments(**changes))
    assert calls == []


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("rouge_score", {}),
        ("lm_eval", {"tasks": ["a.jsonl"]}),
        ("sacrebleu", {"books": {"forget": "a.txt"}, "retain_rows": None, "data": "locuslab/TOFU"}),
    ],
)
def test_a_missing_package_is_named_first(arguments, monkeypatch, package, changes):
    monkeypatch.setattr("alter_peft.options.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=rf"The packages \['{package}'\] are needed"):
        Grid(arguments(**changes))


TWO_PROCESSES = """
import sys, torch
from types import SimpleNamespace
from alter_peft import UnlearnTrainer
from alter_peft.cli import main
from alter_peft.benchmark.methods import METHODS

if "broken" in sys.argv.pop():
    def fail(*args):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("no such luck")
        torch.distributed.barrier()
    METHODS["lora_ga"] = SimpleNamespace(run=fail, trainer=UnlearnTrainer, options={})
main()
group = torch.distributed.distributed_c10d._get_default_group()
print("they wait for", group._get_backend(torch.device("cpu")).options._timeout, flush=True)
"""


@pytest.mark.slow
def test_two_processes_run_one_grid(base, tmp_path):
    """They train together; the main one measures and writes. A failure of one of them ends the run, which resumes."""
    out = tmp_path / "out"
    teach = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "bf16": False}
    options = {"teach": teach, "lora_ga": {"max_steps": 2, "bf16": False}, "alter": {"max_steps": 2, "bf16": False}}
    options = {name: {**own, "disable_tqdm": True} for name, own in options.items()}
    grid = {
        "model": str(base / "model"), "data": str(base / "tofu"), "output_dir": str(out), "oracle_seeds": [0, 1],
        "methods": ["alter", "lora_ga"], "max_new_tokens": 2, "answered": 2, "rows": 2, "options": options,
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(tmp_path / "run.py"), "benchmark", "--config", str(tmp_path / "grid.yaml")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    broken, done = (
        subprocess.run([*command, how], env=environment, capture_output=True, text=True, timeout=900)
        for how in ("broken", "whole")
    )
    assert broken.returncode == 1 and "RuntimeError: no such luck" in broken.stderr, broken.stderr[-6000:]
    assert "target: training" in broken.stdout and "alter-0: training" in broken.stdout
    assert done.returncode == 0, done.stderr[-6000:]
    assert "lora_ga-0: training" in done.stdout and done.stdout.count("training") == 2  # a line of each process
    assert done.stdout.count("| lora_ga | ") == 1 and done.stdout.count("they wait for 1 day, 0:00:00") == 2
    cells = {path.parent.name: Result.load(path) for path in out.glob("*/result.json")}
    assert set(cells) == {"target", "oracle-0", "oracle-1", "alter-0", "lora_ga-0"}
    assert all(cell.error is None and cell.scores for cell in cells.values())


def test_real_methods_and_attacks_in_one_go(base, tmp_path, monkeypatch):
    """What was trained in this run can be copied and attacked, as what a later run loads."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    quick = {"max_steps": 2, "disable_tqdm": True}
    results = run_benchmark(
        BenchmarkArguments(
            model=str(base / "model"), data=str(base / "tofu"), output_dir=str(tmp_path / "out"),
            oracle_seeds=[0, 1], methods=["alter", "lora_ihl"], attacks=["quantization", "switching_off"],
            max_new_tokens=2, rows=2, answered=1, options=dict.fromkeys(("teach", "alter", "lora_ihl"), quick),
        )
    )  # fmt: skip
    assert [(result.name, result.error) for result in results[3:]] == [("alter", None), ("lora_ihl", None)]
    for result in results[3:]:
        assert Key("forget, 4 bits", "probability", "quantization") in result.scores
        assert Key("forget", "probability", "switching_off") in result.scores
        assert result.environment["peft"] and result.settings["processes"] == 1
    seen = SeenTokens.load(tmp_path / "out" / "alter-0" / "tokens.json")
    assert list(seen.sizes) == ["forget", "retain", "real_authors", "world_facts"] and seen.above
