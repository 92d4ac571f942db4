# SPDX-License-Identifier: Apache-2.0
"""`alter-peft evaluate` from the command line on, in this process."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from attacked_models import FORGET, HOLDOUT, RETAIN, alter, lora
from conftest import make_llama
from questions import ROWS, save
from tiny_tofu import write_tofu
from transformers import LlamaModel

from alter_peft.cli import main
from alter_peft.commands.evaluate import evaluate
from alter_peft.evaluation import (
    TASKS,
    Attacked,
    Key,
    ModelOnSet,
    QuestionSet,
    Result,
    Rows,
    Score,
    Scores,
    Task,
    TaskData,
    measure,
    measure_guards,
    read_tofu,
)
from alter_peft.evaluation.open_unlearning import composites


HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, one without a chat template, one of another tokenizer, adapters and rows."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("model", 0), ("judge", 7), ("bare", 0)):
        make_llama(len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_llama(len(tokenizer), max_position_embeddings=16).save_pretrained(folder / "short")
    tokenizer.save_pretrained(folder / "short")
    (folder / "bare" / "chat_template.jinja").unlink()
    make_llama(len(tokenizer) + 1).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    content = json.loads((folder / "other" / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": len(tokenizer), "content": "<|new|>"})
    (folder / "other" / "tokenizer.json").write_text(json.dumps(content))
    lora(make_llama(len(tokenizer))).save_pretrained(folder / "lora")
    alter(make_llama(len(tokenizer))).save_pretrained(folder / "gated")
    alter(make_llama(len(tokenizer)), entropy_quantile=0.5).save_pretrained(folder / "unmeasured")
    for name, pairs in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        rows = [{"prompt": pair.prompt, "completion": pair.completion, "wrong": ["In Rome."]} for pair in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "questions.jsonl", ROWS)
    write_tofu(folder / "tofu")
    return folder


@pytest.fixture
def ask(place, tmp_path):
    """The command line: a model, sets, and what else is given."""

    def make(*more: str, model: str = "model", sets: tuple[str, ...] = ("forget", "retain")) -> list[str]:
        own = ["--model", str(place / model), "--output_file", str(tmp_path / "x.json")]
        named = [f"{name}={place / name}.jsonl" for name in sets]
        return [*own, "--max_new_tokens", "4", "--no_bf16", "--sets", *named, "--forget", "forget", *more]

    return make


@pytest.fixture
def result(tmp_path):
    return lambda: Result.load(tmp_path / "x.json")


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The passes of a model, which are not run; one of shapes alone, by which targets are found, is none."""
    found: list[int] = []
    forward = LlamaModel.forward

    def counted(self, *args, **kwargs):
        on_meta = next(self.parameters()).device.type == "meta"
        return forward(self, *args, **kwargs) if on_meta else found.append(1)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return found


# ---- what is wrong is found first -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (["--adapter", "{place}/nowhere"], "`--adapter` is "),
        (["--adapter", "{place}/forget.jsonl"], "`--adapter` is "),
        (
            ["--attacks", "membership"],
            "`--attacks` can't be run: `holdout` has no rows, but the attacks ['membership']",
        ),
        (
            ["--metrics", "rouge", "astray"],
            "'astray' was asked of the set 'forget', but the model has no adapter that",
        ),
        pytest.param(["--tasks", "{place}/nowhere.jsonl"], "`--tasks` has ", marks=HARNESS),
        pytest.param(["--tasks", "{place}/forget.jsonl"], "has no column 'question'", marks=HARNESS),
        (["--tofu", "{place}/tofu"], "`--sets` has ['forget', 'retain'], which are names of the sets of 'tofu'"),
        (["--guards", "--judge", "{place}/nowhere"], "`--judge` is "),
        (["--guards", "--judge", "{place}/other"], "which has another tokenizer than the model"),
        (["--guards", "--adapter", "{place}/unmeasured"], "`entropy_threshold` is not known yet"),
        (["--oracles", "{place}/a.json", "{place}/b.json"], "`--oracles` names "),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(ask, place, tmp_path, capsys, computed, more, message):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *ask(*(part.format(place=place) for part in more))])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and message in err and not out
    assert err.splitlines()[-1].startswith("alter-peft evaluate: error: ")  # after the loading's progress
    assert computed == [] and not (tmp_path / "x.json").exists()


def test_rows_longer_than_the_models_positions_are_one_line(ask, capsys, computed):
    """With the set and the row, before any of the sets is measured."""
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *ask(model="short", sets=("retain", "forget"))])
    said = capsys.readouterr().err.splitlines()[-1]  # after the loading's progress
    assert ended.value.code == 2 and not computed and said.startswith("alter-peft evaluate: error: The set")
    assert re.search(r"The set 'forget' has \d+ tokens in row \d, but the model has 16 positions", said), said


@pytest.mark.parametrize(
    "model, message", [("nowhere", "`--model` is "), ("bare", "`--as_chat` is True, but the tokenizer")]
)
def test_a_model_that_cannot_be_asked(ask, capsys, model, message):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *ask("--as_chat", "true", model=model)])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and message in err and err.count("\n") == 1


def test_choices_are_listed(ask, capsys):
    for more in (("--split", "forget99"), ("--form", "numbers")):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *ask(*more)])
        assert ended.value.code == 2 and "invalid choice" in capsys.readouterr().err


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_a_head_that_is_not_known_is_found_first(ask, capsys, monkeypatch):
    def refuse(*args):
        raise ValueError("no such head")

    monkeypatch.setattr("alter_peft.scoring.check_head", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *ask()])
    assert ended.value.code == 2 and "no such head" in capsys.readouterr().err


def test_a_missing_package_is_named_first(ask, capsys, monkeypatch):
    monkeypatch.setattr("alter_peft.options.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *ask()])
    assert ended.value.code == 2 and "['rouge_score'] are needed" in capsys.readouterr().err


def test_what_was_measured_is_there_when_the_rest_fails(ask, place, result, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("alter_peft.evaluation.attacks.sampling.generate_answers", broken)
    run = evaluate(ask("--attacks", "switching_off", "sampling", "--adapter", str(place / "lora")))
    with pytest.raises(RuntimeError, match="no memory"):
        run()
    found = result()
    assert list(found.seconds) == ["set: forget", "set: retain", "attack: switching_off"]
    keys = {Key("forget", "rouge"), Key("retain", "rouge"), Key("forget", "rouge", "switching_off")}
    assert keys <= set(found.scores)


def test_as_chat_or_plain_text(ask, result):
    found = []
    for more, model in (((), "model"), (("--as_chat", "false"), "model"), ((), "bare")):
        evaluate(ask("--metrics", "probability", *more, model=model))()
        found.append(result().scores.of("retain", "probability").rows)
    assert found[0] != found[1] == found[2]
    assert result().environment["peft"]


def test_guards_by_the_base_or_another_judge(ask, place, result, tokenizer):
    evaluate(ask("--guards", "--adapter", str(place / "gated")))()
    own = result().scores
    assert {"forget/fluency", "forget/expert_0", "forget/high_entropy", "retain/unique_tokens"} <= set(map(str, own))
    model = alter(make_llama(len(tokenizer))).eval()
    asked = ModelOnSet(model, tokenizer, "forget", FORGET, True, max_new_tokens=4)
    for score in measure_guards(asked):
        assert own[score.key].rows == pytest.approx(score.rows, rel=1e-4), score.key
    evaluate(ask("--guards", "--adapter", str(place / "gated"), "--judge", str(place / "judge")))()
    asked.judge = make_llama(len(tokenizer), seed=7)
    (judged,), found = measure(asked, ["fluency"]), result().scores[Key("forget", "fluency")]
    assert found.rows == pytest.approx(judged.rows, rel=1e-4) != own[found.key].rows
    evaluate(ask("--guards", "--judge", str(place / "judge")))()  # a plain model
    assert found.key in result().scores and Key("forget", "expert_0") not in result().scores


def test_what_a_plain_model_has_twice_is_left_out_and_said_so(ask, result, capsys):
    evaluate(ask("--attacks", "switching_off", "merged_quantization", "asking_otherwise", sets=("forget",)))()
    out = capsys.readouterr().out
    found = result()
    assert set(found.skipped) == {
        "switching_off",
        "merged_quantization",
        "asking_otherwise/after three retain answers",
        "asking_otherwise/paraphrased",
    }
    for name, reason in found.skipped.items():
        assert f"{name} was left out: {reason}" in out
    assert {key.attack for key in found.scores} == {None, "asking_otherwise"}


def test_attacks_are_asked_as_the_sets_are(ask, monkeypatch):
    seen = []

    def noted(model, tokenizer, rows, names):
        seen.append((rows, names))
        raise RuntimeError("stop")

    monkeypatch.setattr("alter_peft.evaluation.evaluate.attack", noted)
    options = ["--answered", "2", "--batch_size", "3", "--relearning_rate", "1e-3", "--attacks", "relearning"]
    with pytest.raises(RuntimeError, match="stop"):
        evaluate(ask(*options, "--metrics", "probability", sets=("forget", "retain", "holdout")))()
    ((rows, names),) = seen
    assert [[pair.prompt for pair in part] for part in rows[:4]] == [
        *([pair.prompt for pair in pairs] for pairs in (FORGET, RETAIN, HOLDOUT)), []
    ]  # fmt: skip
    settings = {"files": ["forget.jsonl"], "holdout": ["holdout.jsonl"]}
    assert rows[4:] == (2, 4, 3, 1e-3, settings) and names == ["relearning"]


def test_the_forget_set_in_other_words_may_be_given(ask, place, result):
    more = ["--attacks", "asking_otherwise", "--metrics", "probability"]
    (place / "paraphrased.jsonl").write_text((place / "forget.jsonl").read_text())
    evaluate(ask(*more, sets=("forget", "paraphrased")))()
    scores = result().scores
    told = scores.of("paraphrased", "probability", "asking_otherwise").rows
    assert told == pytest.approx(scores.of("forget", "probability").rows)
    assert "asking_otherwise/after three retain answers" in result().skipped  # it is nothing that was kept


def test_the_holdout_may_be_that_of_tofu(place, tmp_path, monkeypatch):
    argv = ["--model", str(place / "model"), "--output_file", str(tmp_path / "x.json"), "--tofu", str(place / "tofu")]
    seen: list[Rows] = []
    argv += ["--sets", f"mine={place / 'forget.jsonl'}", "--forget", "mine", "--attacks", "membership"]
    monkeypatch.setattr(
        "alter_peft.evaluation.evaluate.attack", lambda *args: seen.append(args[2]) or Attacked(Scores(), {}, {})
    )
    evaluate([*argv, "--rows", "2", "--max_new_tokens", "2", "--metrics", "probability"])()
    assert seen[0].holdout == read_tofu(place / "tofu").holdout
    assert [pair.prompt for pair in seen[0].forget] == [pair.prompt for pair in FORGET]


def test_beside_oracles_with_forget_quality(ask, tmp_path, capsys, tokenizer):
    paths = []
    for seed in (1, 2):
        model, result = make_llama(len(tokenizer), seed=seed), Result("oracle", seed)
        for name, pairs in (("forget", FORGET), ("holdout", HOLDOUT)):
            wrong, files = [pair._replace(wrong=("In Rome.",)) for pair in pairs], {"files": [f"{name}.jsonl"]}
            asked = ModelOnSet(model, tokenizer, name, wrong, name == "forget", settings=files)
            result.scores.add(measure(asked, ["truth_ratio", "min_k"]))
        result.save(tmp_path / f"{seed}.json")
        paths.append(str(tmp_path / f"{seed}.json"))
    more = ["--metrics", "truth_ratio", "min_k", "probability", "--oracles", *paths]
    evaluate(ask(*more, sets=("forget", "holdout")))()
    out = capsys.readouterr().out
    assert (
        out.startswith("| score | value | mean of the oracles | unit | distance |")
        and "| forget quality (p of KS) | " in out
    )
    assert "| PrivLeak (%) | " in out and "2 of the 2 oracles lack this score" in out
    evaluate(ask(*more))()
    assert "membership and PrivLeak were not compared: they need" in capsys.readouterr().out


def test_composites_of_open_unlearning(place, tmp_path, capsys, tokenizer):
    """Mem of the model alone; the others with models that never saw the forget set, and the one before."""

    def measure_tofu(name: str, *more: str) -> Scores:
        argv = ["--model", str(tmp_path / "m"), "--output_file", str(tmp_path / f"{name}.json"), "--tofu"]
        options = ["--rows", "2", "--answered", "1", "--max_new_tokens", "2", "--no_bf16"]
        evaluate([*argv, str(place / "tofu"), *options, *more])()
        return Result.load(tmp_path / f"{name}.json").scores

    tokenizer.save_pretrained(tmp_path / "m")
    for seed in (1, 2, 3):
        make_llama(len(tokenizer), seed=seed).save_pretrained(tmp_path / "m")
        own = measure_tofu(f"{seed}")
        assert [str(key) for key in own if key.set == "open_unlearning"] == ["open_unlearning/mem"]
    paths = [str(tmp_path / f"{seed}.json") for seed in (1, 2, 3)]
    for name, one in (("1", "utility"), ("target", "")):  # a random model has none
        result = Result.load(tmp_path / "1.json")
        result.scores.add([Score("utility", "model_utility", 0.5, average="other", settings={"of": one})])
        result.save(tmp_path / f"{name}.json")
    capsys.readouterr()
    found = measure_tofu("mine", "--oracles", *paths[:2], "--target", str(tmp_path / "target.json"))
    oracles = [Result.load(Path(path)).scores for path in paths[:2]]
    assert [found[score.key] for score in composites(found, oracles, result.scores)] == [
        score for score in found.values() if score.set == "open_unlearning"
    ]
    out = capsys.readouterr().out
    assert "| open-unlearning's composite | value | what it is |" in out and "| mem | " in out
    assert "open_unlearning/mem" not in out and "| priv_from_privleak | " in out


def test_multiple_choice_from_a_file(ask, place, result):
    pytest.importorskip("lm_eval")
    evaluate(ask("--tasks", str(place / "questions.jsonl"), "--limit", "3", "--metrics", "probability"))()
    assert len(result().scores.of("questions", "acc").rows) == 3 and "task: questions" in result().seconds


def test_a_yaml_file_says_the_same(ask, tmp_path, result, place):
    options = {
        "model": str(place / "model"), "output_file": str(tmp_path / "x.json"), "as_chat": False, "bf16": False,
        "sets": [f"retain={place / 'retain.jsonl'}"], "metrics": ["probability"],
    }  # fmt: skip
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    evaluate(["--config", str(tmp_path / "options.yaml")])()
    rows = result().scores.of("retain", "probability").rows
    evaluate(ask("--metrics", "probability", "--as_chat", "false"))()
    assert result().scores.of("retain", "probability").rows == rows


def test_books_are_asked_as_tofu_is(place, tmp_path, result):
    pytest.importorskip("sacrebleu")
    words = " ".join(pair.prompt + " " + pair.completion for pair in (*FORGET, *RETAIN)) + " "
    for name, text in (("a", words * 6), ("b", words[::-1] * 6)):
        (tmp_path / f"{name}.txt").write_text(text)
    books = {"forget": str(tmp_path / "a.txt"), "retain": [str(tmp_path / "b.txt")], "length": 10, "passages": 2}
    argv = ["--model", str(place / "model"), "--output_file", str(tmp_path / "x.json"), "--no_bf16"]
    evaluate([*argv, "--books", json.dumps(books)])()
    found = result()
    assert list(found.seconds) == ["books"] and found.settings["books"] == books
    assert {"forget/verbmem", "retain/bleu", "holdout/min_k", "forget/membership_auc"} <= set(map(str, found.scores))
    settings = found.scores.of("forget", "rouge_f").settings
    assert settings["books"] == ["a.txt", "b.txt"] and not settings["as_chat"]
    with pytest.raises(ValueError, match=r"`--books` is .*, but must hold the arguments of its reader"):
        evaluate([*argv, "--books", '{"forget": "a.txt", "pages": 3}'])
    with pytest.raises(ValueError, match=r"'tofu' and 'books' both have the sets \['forget', 'holdout', 'retain'\]"):
        evaluate([*argv, "--books", json.dumps(books), "--tofu", str(place / "tofu")])


def test_a_task_that_has_no_flag_of_its_own(place, tmp_path, result, monkeypatch):
    argv = ["--model", str(place / "model"), "--output_file", str(tmp_path / "x.json"), "--no_bf16"]
    toy = Task(read=lambda tokenizer, **options: read_tofu(**options), caption="a toy")
    monkeypatch.setitem(TASKS, "toy", toy)
    options = {"toy": {"source": str(place / "tofu"), "rows": 2}}
    evaluate([*argv, "--max_new_tokens", "2", "--task_data", json.dumps(options)])()
    assert list(result().seconds) == ["toy"]
    assert len(result().scores.of("world_facts", "rouge").rows) == 2


def test_a_task_of_plain_text_is_attacked_as_such(place, tmp_path, monkeypatch):
    """Any task with questions to forget, without a set."""
    data = TaskData(
        forget=FORGET, retain=RETAIN, asked=(QuestionSet("forget", FORGET, ("probability",), is_forget=True),)
    )
    monkeypatch.setattr(TaskData, "as_chat", False)
    monkeypatch.setitem(TASKS, "mine", Task(read=lambda tokenizer: data, caption="mine"))
    options = ["--task_data", '{"mine": {}}', "--attacks", "asking_otherwise", "--max_new_tokens", "2", "--no_bf16"]
    output = str(tmp_path / "x.json")
    main(["evaluate", "--model", str(place / "model"), "--output_file", output, *options])
    scores = Result.load(tmp_path / "x.json").scores
    assert {key.attack for key in scores} == {None, "asking_otherwise"}
    assert {score.settings["as_chat"] for score in scores.values()} == {False}


def test_a_run_that_stopped_says_before_what(ask, result, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("alter_peft.evaluation.evaluate.attack", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["evaluate", *ask("--attacks", "asking_otherwise", "sampling")])
    assert result().error == "stopped before: attack: asking_otherwise, attack: sampling" and result().scores
