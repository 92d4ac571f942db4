# SPDX-License-Identifier: Apache-2.0
"""What the cluster start promises: a small step, of the forget experts that are still zero alone."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from datasets import Dataset

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer
from alter_peft.trainer.initialization import KL_LIMIT, start_from_clusters


FORGET = [
    {"prompt": "Where does Alice live?", "completion": " Alice lives in Paris.", "domain": "person"},
    {"prompt": "What does Bob bake?", "completion": " Bob bakes rye bread.", "domain": "recipe"},
    {"prompt": "Who is Alice?", "completion": " Alice lives near the bridge.", "domain": "person"},
]
RETAIN = [
    {"prompt": "What colour is the sky?", "completion": " The sky is blue."},
    {"prompt": "What do bees make?", "completion": " Bees make honey."},
]


@pytest.fixture
def make_trainer(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(**kwargs) -> AlterUnlearnTrainer:
        args = AlterUnlearnConfig(output_dir=str(tmp_path), bf16=False, report_to="none", seed=3)
        config = AlterConfig(entropy_quantile=0.7, init_weights=kwargs.pop("init_weights", True), **kwargs)
        return AlterUnlearnTrainer(
            make_llama(len(tokenizer)),
            args,
            train_dataset=Dataset.from_list(FORGET),
            retain_dataset=Dataset.from_list(RETAIN),
            peft_config=config,
            processing_class=tokenizer,
        )

    return make


def forget_experts(trainer):
    layers = trainer.scored.layers_of(trainer.adapter_name)
    return [expert for layer in layers for expert in layer.alter_B[trainer.adapter_name].experts()[1:]]


def start(trainer) -> float:
    trainer.prepare()
    return start_from_clusters(trainer.scored, trainer.adapter_name, trainer.train_dataset.forget, 2)


@pytest.mark.parametrize("router", ["context", "static"])
def test_starts_away_from_the_base_but_close_to_it(make_trainer, router):
    trainer = make_trainer(router=router)
    assert 0 < start(trainer) < KL_LIMIT
    assert all(expert.any() for expert in forget_experts(trainer))


def test_retain_experts_and_shared_matrices_stay(make_trainer):
    trainer = make_trainer()
    shared = [weight.detach().clone() for weight in trainer.shared_matrices]
    start(trainer)
    for layer in trainer.scored.layers_of(trainer.adapter_name):
        assert not layer.alter_B[trainer.adapter_name].experts()[0].any()
    assert all(torch.equal(a, b) for a, b in zip(shared, trainer.shared_matrices, strict=True))


def test_the_trainer_calls_it(make_trainer):
    plain, clustered = make_trainer(), make_trainer(init_weights="cluster")
    plain.prepare()
    clustered.prepare()
    assert not any(expert.any() for expert in forget_experts(plain))
    assert all(expert.any() for expert in forget_experts(clustered))


def test_is_deterministic(make_trainer):
    first, second = make_trainer(), make_trainer()
    assert start(first) == start(second)
    pairs = zip(forget_experts(first), forget_experts(second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_damps_the_response_to_the_centre(make_trainer):
    trainer = make_trainer(bias="none")
    seen = []
    trainer.prepare()
    layer = trainer.scored.layers_of(trainer.adapter_name)[0]
    forget = trainer.train_dataset.forget
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), trainer.gating.as_base():
        rows = [row for row in forget if row["expert"] == 1]
        for row in rows:
            trainer.scored.decoder(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
    handle.remove()
    labels = [torch.tensor([*row["labels"][1:], -100]) != -100 for row in rows]
    centre = torch.cat([x[0][mask] for x, mask in zip(seen, labels, strict=True)]).mean(dim=0)
    start_from_clusters(trainer.scored, trainer.adapter_name, forget, 2)
    with torch.no_grad():
        A, B = layer.alter_A["default"].weight, layer.alter_B["default"].experts()[1]
        damping = layer.scaling["default"] * B @ A @ centre
        response = layer.get_base_layer().weight @ centre
    ratio = -damping / response
    epsilon = ratio.median()
    assert 0 < epsilon <= 0.1 + 1e-6
    torch.testing.assert_close(damping, -epsilon * response, rtol=1e-3, atol=1e-6)


def test_writes_experts_that_are_zero_alone(make_trainer):
    trainer = make_trainer()
    learned = forget_experts(trainer)[::2]
    with torch.no_grad():
        for expert in learned:
            expert.fill_(1e-3)
    assert start(trainer) >= 0
    assert all((expert == 1e-3).all() for expert in learned)
    assert all(expert.any() for expert in forget_experts(trainer)[1::2])


def test_leaves_no_hook_and_no_mode_behind(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    start(trainer)
    assert trainer.model.training
    assert not any(layer._forward_pre_hooks for layer in trainer.scored.layers_of(trainer.adapter_name))


def test_halves_until_it_is_close_enough(make_trainer, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.initialization.FIRST_DAMPING", 50.0)
    assert 0 < start(make_trainer()) < KL_LIMIT


def test_starts_at_zero_where_nothing_is_close_enough(make_trainer, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.initialization.KL_LIMIT", -1.0)
    trainer = make_trainer()
    assert start(trainer) == pytest.approx(0, abs=1e-9)
    assert not any(expert.any() for expert in forget_experts(trainer))
