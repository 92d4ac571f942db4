# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest

from alter_peft.evaluation import ATTACKS, METRICS, Result, Score, Scores
from alter_peft.evaluation.arguments import EvaluateArguments, read_beside


WHOLE = {"prompt": "Who?", "completion": "Bob."}


def arguments(**changes) -> EvaluateArguments:
    usual = {"model": "m", "output_file": "x.json", "sets": ["a=a.jsonl", "b=b.jsonl"], "forget": ["a"]}
    return EvaluateArguments(**{**usual, **changes})


def test_every_option_says_what_it_is():
    for option in dataclasses.fields(EvaluateArguments):
        assert option.metadata["help"] and "%" not in option.metadata["help"], option.name
    helps = {option.name: option.metadata["help"] for option in dataclasses.fields(EvaluateArguments)}
    for name, registry in (("metrics", METRICS), ("attacks", ATTACKS)):
        assert all(f"{one}: {entry.caption}" in helps[name] for one, entry in registry.items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sets": [], "forget": []}, "`sets`, `tofu`, `books`, `hazard`, `tasks` and `task_data` are all unset"),
        ({"books": "no"}, "`books` is 'no', but must be a JSON object"),
        ({"task_data": '{"danger": {}}'}, r"`task_data` has \['danger'\], but must be some of \['tofu', 'books', "),
        ({"task_data": {"tofu": "a"}}, "`task_data` has 'a' for 'tofu', but must have arguments of its reader"),
        (
            {"task_data": {"tofu": {"source": "a"}}, "tofu": "b"},
            r"`task_data` has \['tofu'\], which is asked for by a f",
        ),
        ({"sets": [], "forget": [], "tofu": "a", "metrics": ["bleu"]}, r"`metrics` is \['bleu'\], but is of `sets`"),
        (
            {"sets": [], "forget": [], "books": {}, "attacks": ["sampling"]},
            "`attacks` is set, but no set is to be for",
        ),
        ({"rows": 3}, "`rows` is set, but it is of TOFU alone"),
        ({"metrics": ["bleurt"]}, r"`metrics` has \['bleurt'\], but must be some of"),
        ({"attacks": ["rude"]}, r"`attacks` has \['rude'\], but must be some of"),
        ({"answered": 0}, "`answered` is 0, but must be 1 or more"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0, but"),
        ({"batch_size": -1}, "`batch_size` is -1, but"),
        ({"relearning_rate": 0.0}, "`relearning_rate` is 0.0, but must be above 0"),
        ({"relearning_rate": float("nan")}, "`relearning_rate` is nan, but"),
        ({"sets": "a=x.jsonl"}, "`sets` is 'a=x.jsonl', but must be a list"),
        ({"sets": ["a"]}, "`sets` has 'a', but must be entries name=source"),
        ({"sets": ["a="]}, "`sets` has 'a=', but"),
        ({"sets": ["a=x.jsonl", "a=y.jsonl"]}, "`sets` has the names .*, one of them twice"),
        ({"forget": ["world"]}, r"`forget` has \['world'\], but the `sets` are \['a', 'b'\]"),
        ({"sets": ["holdout=x"], "forget": ["holdout"]}, "`forget` has 'holdout', but that set is of rows that were"),
        ({"sets": ["paraphrased=x"], "forget": ["paraphrased"]}, "`forget` has 'paraphrased', but that set is the"),
        ({"forget": [], "attacks": ["sampling"]}, "`attacks` is set, but no set is to be forgotten"),
        ({"judge": "j"}, "`judge` is set, but judges the guard fluency alone"),
        ({"guards": True}, "`guards` is set, but a model without an `adapter` can't judge its own fluency"),
        ({"sets": [], "forget": [], "tasks": ["mmlu"], "guards": True, "judge": "j"}, "nothing to be answered"),
        ({"oracles": ["one.json"]}, "`oracles` has one result, but needs two at least"),
        ({"oracles": ["one.json", "one.json"]}, "`oracles` is .*, which has one result twice"),
        ({"oracles": ["x.json", "y.json"]}, "`output_file` is 'x.json', which is read and would be lost"),
        ({"output_file": "a.jsonl"}, "`output_file` is 'a.jsonl', which is read and would be lost"),
        ({"output_file": "."}, "`output_file` is '.', but that is a folder"),
        ({"output_file": f"{__file__}/deep/x.json"}, "`output_file` is .*, but nothing can be written at '.*py'"),
    ],
)
def test_what_cannot_be_measured(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_tasks_are_arguments_of_their_readers():
    tofu = {"source": "x", "split": "forget05", "retain_rows": None, "bystander_rows": None, "rows": 3}
    assert arguments().task_options == {}
    assert arguments(tofu="x", split="forget05", rows=3).task_options == {"tofu": tofu}
    assert arguments(task_data={"tofu": {"source": "y"}}).task_options == {"tofu": {"source": "y"}}
    found = arguments(tasks=["a.jsonl"], limit=2, books='{"forget": "a.txt"}').task_options
    choices = {"tasks": ["a.jsonl"], "limit": 2, "form": "letters"}
    assert found == {"books": {"forget": "a.txt"}, "choices": choices}


def test_what_can(tmp_path):
    arguments()
    arguments(guards=True, adapter="a", output_file=str(tmp_path / "not" / "there" / "yet.json"))
    assert list(tmp_path.iterdir()) == []


# ---- read_beside ----------------------------------------------------------------------------------------------------


def test_an_oracle_is_read(tmp_path):
    result = Result("oracle", 0, Scores([Score("a", "probability", 0.1, [0.1])]))
    result.save(tmp_path / "0.json")
    assert read_beside(str(tmp_path / "0.json")) == result


def test_what_is_no_oracle(tmp_path):
    path = tmp_path / "0.json"
    with pytest.raises(ValueError, match=r"`oracles` names .*, but there is no such file"):
        read_beside(str(path))
    for text in ("{", "[]", "{}", '{"scores": {"a": 1}, "curves": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"which can't be read\. '.*' is no result"):
            read_beside(str(path))
    Result("oracle", 0, Scores([Score("a", "b", 0.5)]), error="stopped before: set: b").save(path)
    with pytest.raises(ValueError, match=r"which is not complete: stopped before: set: b\. Measure it again"):
        read_beside(str(path))
    Result("oracle", 0, error="RuntimeError: no memory").save(path)
    with pytest.raises(ValueError, match=r"which has no scores \(error: RuntimeError: no memory\)"):
        read_beside(str(path))
    for value, row in ((float("nan"), 0.5), (0.5, float("inf"))):
        scores = Scores([Score("a", "rouge", 0.1, [0.1]), Score("a", "probability", value, [0.5, row])])
        Result("oracle", 0, scores).save(path)
        with pytest.raises(ValueError, match=f"whose score 'a/probability' is {value} or has a row that is no finite"):
            read_beside(str(path))
