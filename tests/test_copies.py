# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import MethodType

import pytest
import torch
from attacked_models import FORGET, HOLDOUT, KINDS, RETAIN, learning, model_of, prompt, snapshot
from conftest import make_llama
from peft import PeftModel

from alter_peft.benchmark.methods import METHODS, UnlearningData
from alter_peft.evaluation import Rows, attack, score_answers
from alter_peft.evaluation.copies import copied, without_adapters
from alter_peft.evaluation.tasks import TaskData


# ---- copied ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["alter", "lora_ga"])
def trained(request, tokenizer, tmp_path, monkeypatch):
    """A model as its training leaves it, under bfloat16 autocast, and the same as it is loaded."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = UnlearningData(*map(TaskData().training_rows, (FORGET, RETAIN, HOLDOUT)))
    options = {"max_steps": 2, "disable_tqdm": True}
    model = METHODS[request.param].run(make_llama(len(tokenizer)), tokenizer, data, tmp_path / "a", 0, options)
    assert "forward" in model.__dict__ and "forward" in model.get_base_model().__dict__
    return model.eval(), PeftModel.from_pretrained(make_llama(len(tokenizer)), tmp_path / "a").eval()


def ran(model, tokenizer, *watched) -> list[int]:
    """Which of the watched models' decoders run when the first one is asked."""
    found = []
    hooks = [
        one.get_base_model().model.register_forward_hook(lambda *_, i=i: found.append(i))
        for i, one in enumerate(watched)
    ]
    model(**tokenizer(["Who bakes?"], return_tensors="pt", return_token_type_ids=False))
    for hook in hooks:
        hook.remove()
    return found


def test_the_copy_of_a_trained_model_runs_its_own_weights(trained, tokenizer):
    model, loaded = trained
    before = snapshot(model)
    copy = copied(model)
    assert ran(copy, tokenizer, model, copy) == [1] and ran(model, tokenizer, model, copy) == [0]
    assert "forward" in model.__dict__ and not any("forward" in one.__dict__ for one in copy.modules())
    assert score_answers(copy, tokenizer, FORGET).probability == pytest.approx(
        score_answers(loaded, tokenizer, FORGET).probability, rel=1e-4
    )
    with torch.no_grad():
        for weight in copy.parameters():
            weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trained_model_is_attacked_as_one_that_was_loaded(trained, tokenizer):
    rows = Rows(FORGET, RETAIN, HOLDOUT, relearning_rate=1e-2)
    for name in ("quantization", "relearning"):
        found, expected = (attack(model, tokenizer, rows, [name]).scores for model in trained)
        for key, score in expected.items():
            assert found[key].rows == pytest.approx(score.rows, rel=1e-2 if key.step else 1e-3), key
            if key.step == 50:
                start = expected[key._replace(step=0)]
                assert score.value != pytest.approx(start.value, rel=0.1), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_not_trained_is_copied_as_ever(kind, tokenizer):
    model = model_of(kind, tokenizer)
    assert (
        score_answers(copied(model), tokenizer, FORGET).probability
        == score_answers(model, tokenizer, FORGET).probability
    )


def test_a_forward_of_its_own_is_named(tokenizer):
    model = make_llama(len(tokenizer))
    model.model.layers[1].forward = MethodType(lambda self, hidden, **options: hidden, model.model.layers[1])
    with pytest.raises(ValueError, match=r"`model` has a `forward` of its own in 'model\.layers\.1'"):
        copied(model)


# ---- without_adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "at rest"])
@pytest.mark.parametrize("kind", ["lora", "static", "gated", "prompt"])
def test_the_adapters_are_off_inside_and_the_same_weights_learn_afterwards(kind, learns, tokenizer):
    model = prompt(make_llama(len(tokenizer))) if kind == "prompt" else model_of(kind, tokenizer)
    if not learns:
        model.requires_grad_(False)
    before, own = learning(model), score_answers(model, tokenizer, FORGET).probability
    assert any(before.values()) == learns
    with without_adapters(model):
        base = score_answers(make_llama(len(tokenizer)), tokenizer, FORGET).probability
        assert score_answers(model, tokenizer, FORGET).probability == base
    assert learning(model) == before
    assert score_answers(model, tokenizer, FORGET).probability == own != base


def test_also_after_an_error(tokenizer):
    model = model_of("lora", tokenizer).requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), without_adapters(model):
        raise RuntimeError("stop")
    assert not any(learning(model).values())
