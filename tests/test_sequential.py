# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from trainer_setup import forget_rows, retain_rows

from alter_peft.benchmark.methods import METHODS, UnlearningData
from alter_peft.benchmark.requests import (
    Requests,
    load_requests,
    run_requests,
    scores_after,
    split_requests,
)
from alter_peft.evaluation import Key, ModelOnSet, Pair, Score, Scores, measure, score_answers
from alter_peft.evaluation.tasks import TaskData


PAIRS = [Pair(row["prompt"], row["completion"]) for row in forget_rows()]
KEPT = [Pair(row["prompt"], row["completion"]) for row in retain_rows()]
DATA = TaskData(forget=PAIRS, retain=KEPT, settings={"file": "tiny"})
GIVEN = UnlearningData(forget_rows(), retain_rows())


def in_parts(count):
    """The forget rows as requests for the trainers."""
    return list(map(DATA.training_rows, split_requests(PAIRS, count)))


def not_measured(model, made):
    return [Score("retain", "probability", 0.0, step=made)]


def test_requests_are_rows_in_their_order():
    assert split_requests(list("abcdef"), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert split_requests([1, 2], 1) == [[1, 2]]


@pytest.mark.parametrize("count", [0, 4, 7])
def test_requests_of_unequal_size_are_refused(count):
    with pytest.raises(ValueError, match=rf"`requests` is {count}, which does not divide the 6 forget rows evenly"):
        split_requests(list("abcdef"), count)


def test_each_request_is_given_to_what_the_one_before_left(tokenizer, tmp_path):
    """With a method that replaces the model, so that every point of a curve can be told."""
    models = [make_llama(len(tokenizer), seed=seed) for seed in range(3)]
    asked = []

    def replace(model, tokenizer, data, folder, seed, options):
        asked.append((models.index(model), [row["prompt"] for row in data.forget], folder.name, seed, options))
        return models[len(asked)]

    requests, options, saved = split_requests(PAIRS, 2), {"learning_rate": 1.0}, []
    last, done = run_requests(
        SimpleNamespace(run=replace), models[0], tokenizer, in_parts(2), GIVEN,
        lambda model, made: scores_after(model, tokenizer, DATA, requests, made), tmp_path, 7, options,
        Requests(Scores()), saved.append,
    )  # fmt: skip
    assert last is models[2] and done.seconds >= 0 and [one.made for one in saved] == [0, 1, 2]
    prompts = [[pair.prompt for pair in request] for request in requests]
    assert asked == [(0, prompts[0], "request-1", 7, options), (1, prompts[1], "request-2", 7, options)]
    means = {
        name: [score_answers(model, tokenizer, pairs).mean for model in models]
        for name, pairs in (("retain", KEPT), ("request 1", requests[0]), ("request 2", requests[1]))
    }
    first, second = means["request 1"], means["request 2"]
    expected = {(name, made): value for name, values in means.items() for made, value in enumerate(values)}
    expected |= {("utility", made): value for made, value in enumerate(means["retain"])}  # of one set alone
    halves = [(first[made] + second[made]) / 2 for made in range(3)]
    expected |= {("forgotten so far", 1): first[1], ("forgotten so far", 2): halves[2]}
    expected |= {("still to come", 0): halves[0], ("still to come", 1): second[1]}
    values = {(key.set, key.step): score.value for key, score in done.scores.items()}
    assert values == pytest.approx(expected)
    assert {key.metric for key in done.scores} == {"probability"} and all(key.attack is None for key in done.scores)
    assert all(score.settings["file"] == "tiny" for score in done.scores.values())


def test_the_largest_seed_has_a_next_one(tokenizer, tmp_path):
    """Each request starts from a state of its own, whatever was drawn before."""
    starts = []

    def draw(model, tokenizer, data, folder, seed, options):
        starts.append((seed, torch.initial_seed()))
        return model

    run_requests(
        SimpleNamespace(run=draw), make_llama(len(tokenizer)), tokenizer, in_parts(2), GIVEN, not_measured,
        tmp_path, 2**32 - 1, {}, Requests(Scores()), lambda done: None,
    )  # fmt: skip
    assert starts == [(2**32 - 1, 2**32 - 1), (2**32 - 1, 0)]


def test_what_is_kept_is_the_probability_part_of_utility(tokenizer):
    model, wrong = make_llama(len(tokenizer)), [pair._replace(wrong=("In Rome.", "No.")) for pair in KEPT]
    sets = {"retain": wrong, "real_authors": wrong[:2], "world_facts": wrong[2:]}
    data = SimpleNamespace(kept_sets=sets, bystander_sets={"bystanders": KEPT[:2]}, settings={})
    found = {score.set: score for score in scores_after(model, tokenizer, data, [], 0, batch_size=2)}
    for name, pairs in (("retain", KEPT), ("bystanders", KEPT[:2])):
        assert found[name].value == pytest.approx(score_answers(model, tokenizer, pairs).mean, rel=1e-4)
    for name in ("real_authors", "world_facts"):
        (score,) = measure(ModelOnSet(model, tokenizer, name, sets[name]), ["normalized_probability"])
        assert found[name].value == pytest.approx(score.value, rel=1e-4)
        assert found[name].key == Key(name, "normalized_probability", step=0)
    parts = [found[name].value for name in sets]
    assert found["utility"].value == pytest.approx(3 / sum(1 / part for part in parts))


@pytest.mark.parametrize("name", ["alter", "lora_ga"])
def test_what_was_saved_says_what_was_trained(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"max_steps": 2, "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False, "retain_weight": 1.0}
    base = make_llama(len(tokenizer))
    live, _ = run_requests(
        METHODS[name], copy.deepcopy(base), tokenizer, in_parts(4), GIVEN, not_measured, tmp_path, 0, options,
        Requests(Scores()), lambda done: None,
    )  # fmt: skip
    saved = load_requests(copy.deepcopy(base), tmp_path, 4)
    assert list(saved.peft_config) == list(live.peft_config)
    for pairs in (PAIRS, KEPT):
        expected = score_answers(live, tokenizer, pairs).probability
        assert score_answers(saved, tokenizer, pairs).probability == pytest.approx(expected, rel=1e-4)
        assert score_answers(base, tokenizer, pairs).probability != pytest.approx(expected, rel=1e-3)
    assert load_requests(base, tmp_path, 5) is None


@pytest.mark.parametrize("name", ["alter", pytest.param("lora_ga", marks=pytest.mark.slow)])
def test_a_run_that_stopped_goes_on_after_the_last_whole_request(name, tokenizer, tmp_path, monkeypatch):
    """And ends where it would have."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"max_steps": 2, "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False}
    base, requests = make_llama(len(tokenizer)), split_requests(PAIRS, 4)
    trained: list[str] = []

    def method(model, tokenizer, data, folder, seed, options):
        trained.append(folder.name)
        return METHODS[name].run(model, tokenizer, data, folder, seed, options)

    def run(folder, before, save):
        return run_requests(
            SimpleNamespace(run=method), copy.deepcopy(base), tokenizer, in_parts(4), GIVEN,
            lambda model, made: scores_after(model, tokenizer, DATA, requests, made), folder, 0, options, before, save,
        )  # fmt: skip

    _, whole = run(tmp_path / "whole", Requests(Scores()), lambda done: None)
    saved = [Requests(Scores())]

    def stop(done):
        saved.append(done)
        if done.made == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Requests(Scores()), stop)
    (tmp_path / "stopped" / "request-3").mkdir()  # what a training that stopped had begun
    trained.clear()
    _, resumed = run(tmp_path / "stopped", saved[-1], saved.append)
    assert trained == ["request-3", "request-4"] and resumed.seconds > saved[3].seconds > 0
    assert resumed.scores.keys() == whole.scores.keys()
    for key, score in whole.scores.items():
        assert resumed.scores[key].value == pytest.approx(score.value, rel=1e-5), key
    trained.clear()
    run(tmp_path / "stopped", resumed, saved.append)
    assert trained == []  # all are there
    shutil.rmtree(tmp_path / "stopped" / "request-2")
    run(tmp_path / "stopped", saved[3], saved.append)
    assert trained == [f"request-{number}" for number in range(1, 5)]  # what is gone is made again, and what follows
