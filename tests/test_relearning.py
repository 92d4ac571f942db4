# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from attacked_models import FORGET, KINDS, RETAIN, assert_unchanged, model_of, snapshot

from alter_peft.evaluation import Rows, Score, encode_pair, score_answers
from alter_peft.evaluation.attacks.relearning import STEPS, _batches, relearn, relearning
from alter_peft.evaluation.base_weights import base_parameters
from alter_peft.evaluation.copies import copied


def at_rate(rate: float, **options) -> Rows:
    return Rows(FORGET, RETAIN, relearning_rate=rate, **options)


def points_of(scores: list[Score], set: str) -> list[Score]:
    return [score for score in scores if score.set == set]


@pytest.fixture(params=KINDS)
def model(request, tokenizer):
    return model_of(request.param, tokenizer)


@pytest.fixture
def copies(monkeypatch):
    """The models that were attacked in the caller's place."""
    made = []

    def noted(model):
        made.append(copied(model))
        return made[-1]

    monkeypatch.setattr("alter_peft.evaluation.attacks.relearning.copied", noted)
    return made


def test_the_model_comes_back_unchanged(model, tokenizer):
    model.train()
    model.requires_grad_(False)
    before = snapshot(model)
    relearn(model, tokenizer, at_rate(1e-2), FORGET, {"forget": FORGET}, steps=[2])
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_all_base_weights_learn_and_the_adapter_does_not(model, tokenizer, copies):
    before = snapshot(model)
    relearn(model, tokenizer, at_rate(1e-2), FORGET, {"forget": FORGET[:1]}, steps=[1])
    (attacked,) = copies
    base = {id(parameter) for parameter in base_parameters(attacked)}
    for name, parameter in attacked.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in base), name


def test_curves_are_those_of_a_loop_by_hand(model, tokenizer):
    """Rows in one batch: AdamW on the mean over all answer tokens."""
    sets = {"trained": FORGET[:3], "other": RETAIN}
    found = relearn(model, tokenizer, at_rate(1e-3), FORGET[:3], sets, steps=[0, 1, 3])
    own = copy.deepcopy(model)
    weights = base_parameters(own)
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in weights], lr=1e-3)
    expected = {"trained": [], "other": []}
    for step in range(4):
        if step in (0, 1, 3):
            for name, pairs in sets.items():
                expected[name].append(score_answers(own, tokenizer, pairs).probability)
        losses, count = 0.0, 0
        for pair in FORGET[:3]:
            ids, start = encode_pair(tokenizer, pair)
            log_p = own(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses -= sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))
            count += len(ids) - start
        (losses / count).backward()
        optimizer.step()
        own.zero_grad()
    assert [(score.step, score.set) for score in found] == [(step, name) for step in (0, 1, 3) for name in sets]
    for name, by_step in expected.items():
        for score, rows in zip(points_of(found, name), by_step, strict=True):
            assert (score.attack, score.metric) == ("relearning", "probability")
            assert score.rows == pytest.approx(rows, rel=1e-3), name
            assert score.value == pytest.approx(sum(rows) / len(rows), rel=1e-3), name
    trained = points_of(found, "trained")
    assert trained[2].value > 1.5 * trained[0].value


def test_half_of_the_forget_set_and_related_text(tokenizer):
    model = model_of("gated", tokenizer)
    rows = Rows(FORGET, holdout=RETAIN, relearning_rate=1e-2)
    found = relearning(model, tokenizer, rows, steps=[0, 30])
    sets = ["held-out half", "trained half", "forget after related"]
    assert list(dict.fromkeys(score.set for score in found)) == sets
    start = score_answers(model, tokenizer, FORGET).probability
    first, last = ({name: points_of(found, name)[i].value for name in sets} for i in (0, 1))
    assert first["trained half"] == pytest.approx(sum(start[::2]) / 3, rel=1e-4)
    assert first["held-out half"] == pytest.approx(sum(start[1::2]) / 2, rel=1e-4)
    assert first["forget after related"] == pytest.approx(sum(start) / 5, rel=1e-4)
    assert last["trained half"] > 0.9 > last["held-out half"]
    on_forget = relearn(model, tokenizer, rows, FORGET, {"forget": FORGET}, steps=[0, 30])
    assert last["forget after related"] < on_forget[1].value


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan")])
def test_a_rate_is_above_0(tokenizer, rate):
    with pytest.raises(ValueError, match=f"`relearning_rate` is {rate}, but must be above 0"):
        relearn(None, tokenizer, at_rate(rate), FORGET, {"a": FORGET})


def test_metrics_are_the_callers(tokenizer):
    model = model_of("plain", tokenizer)
    rows, metrics = Rows(FORGET, answered=2), ["rouge", "exact_memorization"]
    found = relearn(model, tokenizer, rows, FORGET, {"a": FORGET}, steps=[0, 1], metrics=metrics)
    assert [(score.metric, score.step) for score in found] == [(m, step) for step in (0, 1) for m in metrics]


def test_rows_with_false_answers_are_asked_by_choice_too(tokenizer):
    """What an answer's form alone gives makes the true one no likelier than a false one of the same form."""
    model, rate = model_of("plain", tokenizer), at_rate(1e-2, holdout=RETAIN)
    metrics = [score.metric for score in relearning(model, tokenizer, rate, steps=[0])]
    assert metrics == ["probability"] * 3
    false = [pair._replace(wrong=("Nobody.", "The sky is seven.")) for pair in FORGET]
    found = relearning(model, tokenizer, rate._replace(forget=false), steps=[0, 30])
    last = {(score.set, score.metric): score for score in found if score.step == 30}
    assert {metric for _, metric in last} == {"probability", "choice_accuracy"}
    assert last["trained half", "choice_accuracy"].rows == [1.0, 1.0, 1.0]
    part = relearning(model, tokenizer, rate._replace(forget=[*false[1:], FORGET[0]]), steps=[0])
    assert {score.metric for score in part} == {"probability"}


def test_the_seed_is_of_the_order(tokenizer):
    model = model_of("plain", tokenizer)

    def last(seed):
        options = {"steps": [3], "batch_size": 2, "seed": seed}
        return relearn(model, tokenizer, at_rate(1e-2), FORGET, {"a": FORGET}, **options)[0].rows

    assert last(0) == last(0) != last(1)


def test_every_row_comes_once_in_a_round(tokenizer):
    batches = _batches(tokenizer, FORGET, 2, seed=0)
    seen = [tuple(ids) for _ in range(5) for ids, _ in next(batches)]
    all_rows = sorted(tuple(encode_pair(tokenizer, pair)[0]) for pair in FORGET)
    assert sorted(seen[:5]) == sorted(seen[5:]) == all_rows
    assert len(next(_batches(tokenizer, FORGET, 8, seed=0))) == 5


def test_bfloat16_weights_are_attacked_in_float32(tokenizer, copies):
    model = model_of("gated", tokenizer).bfloat16()
    before, after = relearn(model, tokenizer, at_rate(1e-5), FORGET, {"a": FORGET}, steps=[0, 10])
    assert {weight.dtype for weight in base_parameters(copies[0])} == {torch.float32}
    assert {weight.dtype for weight in base_parameters(model)} == {torch.bfloat16}
    assert before.value < after.value


def test_autocast_is_the_callers_and_sees_the_new_weights(tokenizer):
    model = model_of("gated", tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = relearn(model, tokenizer, at_rate(1e-3), FORGET[:1], {"a": FORGET}, steps=[0, 1, 2, 3])
    ids, start = encode_pair(tokenizer, FORGET[0])
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * start + ids[start:]])}
    own = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in base_parameters(own)], lr=1e-3)
    for score in found:
        with torch.autocast("cpu", torch.bfloat16):
            assert score.value == pytest.approx(score_answers(own, tokenizer, FORGET).mean, rel=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            own(**inputs).loss.backward()
        optimizer.step()
        own.zero_grad()
    exact = relearn(model, tokenizer, at_rate(1e-3), FORGET[:1], {"a": FORGET}, steps=[0])
    assert exact[0].value != found[0].value


def test_within_no_grad(tokenizer):
    model = model_of("plain", tokenizer)
    with torch.no_grad():
        before, after = relearn(model, tokenizer, at_rate(1e-2), FORGET, {"a": FORGET}, steps=[0, 1])
    assert before.value < after.value


def test_default_steps_are_one_to_fifty():
    assert STEPS == (0, 1, 2, 5, 10, 20, 50)


@pytest.mark.parametrize("steps", [[], [-1, 2], [5, 1], [1, 1]])
def test_bad_steps(tokenizer, steps):
    with pytest.raises(ValueError, match="`steps` is"):
        relearn(model_of("plain", tokenizer), tokenizer, Rows(FORGET), FORGET, {"a": FORGET}, steps=steps)


def test_too_few_rows(tokenizer):
    model = model_of("plain", tokenizer)
    with pytest.raises(ValueError, match="`trained` is empty"):
        relearn(model, tokenizer, Rows(FORGET), [], {"a": FORGET})
    with pytest.raises(ValueError, match="`forget` has 1 row"):
        relearning(model, tokenizer, Rows(FORGET[:1], holdout=RETAIN))
