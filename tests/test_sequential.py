# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from trainer_setup import forget_rows, retain_rows

from alter_peft.benchmark.methods import METHODS, Task
from alter_peft.benchmark.requests import (
    Requests,
    kept_probabilities,
    load_requests,
    run_requests,
    split_requests,
)
from alter_peft.evaluation import Asked, Pair, measure, score_answers


PAIRS = [Pair(row["prompt"], row["completion"]) for row in forget_rows()]
KEPT = [Pair(row["prompt"], row["completion"]) for row in retain_rows()]


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

    def replace(model, tokenizer, task, folder, seed, options):
        asked.append((models.index(model), [row["prompt"] for row in task.forget], folder.name, seed, options))
        return models[len(asked)]

    requests = split_requests(PAIRS, 2)
    options = {"learning_rate": 1.0}
    task = Task(forget_rows(), retain_rows())

    def probability(model, pairs):
        return score_answers(model, tokenizer, pairs).mean

    def kept(model):
        return {"retain": probability(model, KEPT)}

    saved: list[Requests] = []
    last, done = run_requests(
        SimpleNamespace(run=replace), models[0], tokenizer, requests, task, kept, probability, tmp_path, 7, options,
        Requests({}), saved.append,
    )  # fmt: skip
    assert last is models[2] and done.seconds >= 0 and [one.made for one in saved] == [0, 1, 2]
    curves = done.curves
    prompts = [[pair.prompt for pair in request] for request in requests]
    assert asked == [(0, prompts[0], "request-1", 7, options), (1, prompts[1], "request-2", 7, options)]
    means = {
        name: [score_answers(model, tokenizer, pairs).mean for model in models]
        for name, pairs in (("retain", KEPT), ("request 1", requests[0]), ("request 2", requests[1]))
    }
    for name, values in means.items():
        assert curves[f"requests/{name}"] == [(i, pytest.approx(value)) for i, value in enumerate(values)]
    first, second = means["request 1"], means["request 2"]
    halves = [(first[i] + second[i]) / 2 for i in range(3)]
    assert curves["requests/forgotten"] == [(1, pytest.approx(first[1])), (2, pytest.approx(halves[2]))]
    assert curves["requests/open"] == [(0, pytest.approx(halves[0])), (1, pytest.approx(second[1]))]


def test_the_largest_seed_has_a_next_one(tokenizer, tmp_path):
    """Each request starts from a state of its own, whatever was drawn before."""
    starts = []

    def draw(model, tokenizer, task, folder, seed, options):
        starts.append((seed, torch.initial_seed()))
        return model

    run_requests(
        SimpleNamespace(run=draw), make_llama(len(tokenizer)), tokenizer, split_requests(PAIRS, 2),
        Task(forget_rows(), retain_rows()), lambda model: {}, lambda model, pairs: 0.0,
        tmp_path, 2**32 - 1, {}, Requests({}), lambda done: None,
    )  # fmt: skip
    assert starts == [(2**32 - 1, 2**32 - 1), (2**32 - 1, 0)]


def test_what_is_kept_is_the_probability_part_of_utility(tokenizer):
    model, wrong = make_llama(len(tokenizer)), [pair._replace(wrong=("In Rome.", "No.")) for pair in KEPT]
    sets = {"retain": wrong, "real_authors": wrong[:2], "world_facts": wrong[2:]}
    found = kept_probabilities(model, tokenizer, sets, batch_size=2)
    assert found["retain"] == pytest.approx(score_answers(model, tokenizer, KEPT).mean, rel=1e-4)
    for name in ("real_authors", "world_facts"):
        asked = Asked(model, tokenizer, name, sets[name])
        score = measure(asked, ["normalized_probability"])[f"{name}/normalized_probability"]
        assert found[name] == pytest.approx(score.value, rel=1e-4)
    parts = [found[name] for name in sets]
    assert found["utility"] == pytest.approx(3 / sum(1 / part for part in parts))


@pytest.mark.parametrize("name", ["alter", "lora_ga"])
def test_what_was_saved_says_what_was_trained(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"max_steps": 2, "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False}
    task, base = Task(forget_rows(), retain_rows()), make_llama(len(tokenizer))
    live, _ = run_requests(
        METHODS[name], copy.deepcopy(base), tokenizer, split_requests(PAIRS, 4), task, lambda model: {},
        lambda model, pairs: 0.0, tmp_path, 0, options, Requests({}), lambda done: None,
    )  # fmt: skip
    saved = load_requests(copy.deepcopy(base), tmp_path, 4)
    assert list(saved.peft_config) == list(live.peft_config)
    for pairs in (PAIRS, KEPT):
        expected = score_answers(live, tokenizer, pairs).probability
        assert score_answers(saved, tokenizer, pairs).probability == pytest.approx(expected, rel=1e-4)
        assert score_answers(base, tokenizer, pairs).probability != pytest.approx(expected, rel=1e-3)
    assert load_requests(base, tmp_path, 5) is None


@pytest.mark.parametrize("name", ["alter", "lora_ga"])
def test_a_run_that_stopped_goes_on_after_the_last_whole_request(name, tokenizer, tmp_path, monkeypatch):
    """And ends where it would have."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"max_steps": 2, "disable_tqdm": True, "learning_rate": 1e-2, "bf16": False}
    task, base, requests = Task(forget_rows(), retain_rows()), make_llama(len(tokenizer)), split_requests(PAIRS, 4)
    trained: list[str] = []

    def method(model, tokenizer, task, folder, seed, options):
        trained.append(folder.name)
        return METHODS[name].run(model, tokenizer, task, folder, seed, options)

    def probability(model, pairs):
        return score_answers(model, tokenizer, pairs).mean

    def run(folder, before, save):
        own = (tokenizer, requests, task, lambda model: {"retain": probability(model, KEPT)}, probability)
        return run_requests(SimpleNamespace(run=method), copy.deepcopy(base), *own, folder, 0, options, before, save)

    _, whole = run(tmp_path / "whole", Requests({}), lambda done: None)
    saved = [Requests({})]

    def stop(done):
        saved.append(done)
        if done.made == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Requests({}), stop)
    (tmp_path / "stopped" / "request-3").mkdir()  # what a training that stopped had begun
    trained.clear()
    _, resumed = run(tmp_path / "stopped", saved[-1], saved.append)
    assert trained == ["request-3", "request-4"] and resumed.seconds > saved[3].seconds > 0
    assert resumed.curves.keys() == whole.curves.keys()
    for key, points in whole.curves.items():
        assert resumed.curves[key] == [(number, pytest.approx(value, rel=1e-5)) for number, value in points], key
    trained.clear()
    run(tmp_path / "stopped", resumed, saved.append)
    assert trained == []  # all are there
    shutil.rmtree(tmp_path / "stopped" / "request-2")
    run(tmp_path / "stopped", saved[3], saved.append)
    assert trained == [f"request-{number}" for number in range(1, 5)]  # what is gone is made again, and what follows
