# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from attacked_models import FORGET, KINDS, RETAIN, assert_unchanged, model_of, snapshot

from alter_peft.evaluation import encode_pair, score_answers
from alter_peft.evaluation.base_weights import base_parameters
from alter_peft.evaluation.copies import copied
from alter_peft.evaluation.relearning import STEPS, _batches, relearn, relearning


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

    monkeypatch.setattr("alter_peft.evaluation.relearning.copied", noted)
    return made


def test_the_model_comes_back_unchanged(model, tokenizer):
    model.train()
    model.requires_grad_(False)
    before = snapshot(model)
    relearn(model, tokenizer, FORGET, {"forget": FORGET}, steps=[2], learning_rate=1e-2)
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_all_base_weights_learn_and_the_adapter_does_not(model, tokenizer, copies):
    before = snapshot(model)
    relearn(model, tokenizer, FORGET, {"forget": FORGET[:1]}, steps=[1], learning_rate=1e-2)
    (attacked,) = copies
    base = {id(parameter) for parameter in base_parameters(attacked)}
    for name, parameter in attacked.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in base), name


def test_curves_are_those_of_a_loop_by_hand(model, tokenizer):
    """Rows in one batch: AdamW on the mean over all answer tokens."""
    found = relearn(
        model, tokenizer, FORGET[:3], {"trained": FORGET[:3], "other": RETAIN}, steps=[0, 1, 3], learning_rate=1e-3
    )
    own = copy.deepcopy(model)
    weights = base_parameters(own)
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in weights], lr=1e-3)
    expected = {"trained/probability": [], "other/probability": []}
    for step in range(4):
        if step in (0, 1, 3):
            for name, pairs in (("trained", FORGET[:3]), ("other", RETAIN)):
                expected[f"{name}/probability"].append(score_answers(own, tokenizer, pairs).probability)
        losses, count = 0.0, 0
        for pair in FORGET[:3]:
            ids, start = encode_pair(tokenizer, pair)
            log_p = own(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses -= sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))
            count += len(ids) - start
        (losses / count).backward()
        optimizer.step()
        own.zero_grad()
    assert list(found) == list(expected)
    for key, points in found.items():
        assert [x for x, _ in points] == [0, 1, 3]
        for (_, score), rows in zip(points, expected[key], strict=True):
            assert score.rows == pytest.approx(rows, rel=1e-3), key
            assert score.value == pytest.approx(sum(rows) / len(rows), rel=1e-3), key
    assert found["trained/probability"][2][1].value > 1.5 * found["trained/probability"][0][1].value


def test_half_of_the_forget_set_and_related_text(tokenizer):
    model = model_of("gated", tokenizer)
    options = {"steps": [0, 30], "learning_rate": 1e-2}
    found = relearning(model, tokenizer, FORGET, RETAIN, **options)
    assert list(found) == [
        "relearn_half/held_out/probability",
        "relearn_half/trained/probability",
        "relearn_related/forget/probability",
    ]
    start = score_answers(model, tokenizer, FORGET).probability
    first = {key: points[0][1].value for key, points in found.items()}
    assert first["relearn_half/trained/probability"] == pytest.approx(sum(start[::2]) / 3, rel=1e-4)
    assert first["relearn_half/held_out/probability"] == pytest.approx(sum(start[1::2]) / 2, rel=1e-4)
    assert first["relearn_related/forget/probability"] == pytest.approx(sum(start) / 5, rel=1e-4)
    last = {key: points[1][1].value for key, points in found.items()}
    assert last["relearn_half/trained/probability"] > 0.9 > last["relearn_half/held_out/probability"]
    on_forget = relearn(model, tokenizer, FORGET, {"relearn_related/forget": FORGET}, **options)
    assert last["relearn_related/forget/probability"] < on_forget["relearn_related/forget/probability"][1][1].value


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan")])
def test_a_rate_is_above_0(tokenizer, rate):
    with pytest.raises(ValueError, match=f"`learning_rate` is {rate}, but must be above 0"):
        relearn(None, tokenizer, FORGET, {"a": FORGET}, learning_rate=rate)


def test_metrics_are_the_callers(tokenizer):
    model = model_of("plain", tokenizer)
    found = relearn(
        model, tokenizer, FORGET, {"a": FORGET}, steps=[0, 1], metrics=["rouge", "exact_memorization"], answered=2
    )
    assert list(found) == ["a/rouge", "a/exact_memorization"]


def test_the_seed_is_of_the_order(tokenizer):
    model = model_of("plain", tokenizer)

    def last(seed):
        options = {"steps": [3], "learning_rate": 1e-2, "batch_size": 2}
        return relearn(model, tokenizer, FORGET, {"a": FORGET}, seed=seed, **options)["a/probability"][0][1]

    assert last(0) == last(0) != last(1)


def test_every_row_comes_once_in_a_round(tokenizer):
    batches = _batches(tokenizer, FORGET, 2, seed=0)
    seen = [tuple(row[mask.bool()].tolist()) for _ in range(5) for row, mask in _rows(next(batches))]
    all_rows = sorted(tuple(encode_pair(tokenizer, pair)[0]) for pair in FORGET)
    assert sorted(seen[:5]) == sorted(seen[5:]) == all_rows
    assert len(next(_batches(tokenizer, FORGET, 8, seed=0))["input_ids"]) == 5


def _rows(batch):
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def test_bfloat16_weights_are_attacked_in_float32(tokenizer, copies):
    model = model_of("gated", tokenizer).bfloat16()
    options = {"steps": [0, 10], "learning_rate": 1e-5}
    points = relearn(model, tokenizer, FORGET, {"a": FORGET}, **options)["a/probability"]
    assert {weight.dtype for weight in base_parameters(copies[0])} == {torch.float32}
    assert {weight.dtype for weight in base_parameters(model)} == {torch.bfloat16}
    assert points[0][1].value < points[1][1].value


def test_autocast_is_the_callers_and_sees_the_new_weights(tokenizer):
    model = model_of("gated", tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = relearn(model, tokenizer, FORGET[:1], {"a": FORGET}, steps=[0, 1, 2, 3], learning_rate=1e-3)
    ids, start = encode_pair(tokenizer, FORGET[0])
    inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[-100] * start + ids[start:]])}
    own = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([weight.requires_grad_(True) for weight in base_parameters(own)], lr=1e-3)
    for _, score in found["a/probability"]:
        with torch.autocast("cpu", torch.bfloat16):
            assert score.value == pytest.approx(score_answers(own, tokenizer, FORGET).mean, rel=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            own(**inputs).loss.backward()
        optimizer.step()
        own.zero_grad()
    exact = relearn(model, tokenizer, FORGET[:1], {"a": FORGET}, steps=[0], learning_rate=1e-3)
    assert exact["a/probability"][0][1].value != found["a/probability"][0][1].value


def test_within_no_grad(tokenizer):
    model = model_of("plain", tokenizer)
    with torch.no_grad():
        points = relearn(model, tokenizer, FORGET, {"a": FORGET}, steps=[0, 1], learning_rate=1e-2)["a/probability"]
    assert points[0][1].value < points[1][1].value


def test_default_steps_are_one_to_fifty():
    assert STEPS == (0, 1, 2, 5, 10, 20, 50)


@pytest.mark.parametrize("steps", [[], [-1, 2], [5, 1], [1, 1]])
def test_bad_steps(tokenizer, steps):
    with pytest.raises(ValueError, match="`steps` is"):
        relearn(model_of("plain", tokenizer), tokenizer, FORGET, {"a": FORGET}, steps=steps)


def test_too_few_rows(tokenizer):
    model = model_of("plain", tokenizer)
    with pytest.raises(ValueError, match="`rows` is empty"):
        relearn(model, tokenizer, [], {"a": FORGET})
    with pytest.raises(ValueError, match="`forget` has 1 rows"):
        relearning(model, tokenizer, FORGET[:1], RETAIN)
