# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A later adapter, trained while an earlier one is active: it learns what the two of them say together."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from conftest import make_llama
from peft import get_peft_model
from test_trainer import LEVEL, SGD
from trainer_setup import adapter_state, forget_rows, make_trainer, retain_rows

from alter_peft import AlterConfig
from alter_peft.evaluation import Pair, chat_or_plain, score_answers


LATER = forget_rows().select(range(4, 8)).remove_columns("domain")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Phase I of one test must not be read by another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def two_adapters(tokenizer, earlier: dict[str, Any] | None = None, later: dict[str, Any] | None = None) -> Any:
    """A random earlier adapter and a fresh later one, both active, the later one first."""
    torch.manual_seed(2)
    own = {"num_forget_experts": 3, "init_weights": False, "task_type": "CAUSAL_LM", **(earlier or {})}
    model = get_peft_model(make_llama(len(tokenizer)), AlterConfig(**own))
    torch.manual_seed(3)
    model.add_adapter("later", AlterConfig(**{"entropy_quantile": 0.6, "r": 4, **(later or {})}))
    model.base_model.set_adapter(["later", "default"])
    return model


def of(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if f".{name}." in key}


def test_the_first_learns_and_the_others_stay(tmp_path, tokenizer):
    model = two_adapters(tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER, num_train_epochs=2)
    before = adapter_state(trainer)
    learning = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert learning and all(".later." in name for name in learning)
    trainer.train()
    after = adapter_state(trainer)
    assert all(torch.equal(value, after[name]) for name, value in of(before, "default").items())
    assert not all(torch.equal(value, after[name]) for name, value in of(before, "later").items())
    assert trainer.model.active_adapters == ["later", "default"]


@pytest.mark.parametrize("router", ["context", "static"])
def test_what_learns_is_the_sum(tmp_path, tokenizer, router):
    """The forget rows come to their level as the two adapters will be asked, whatever the earlier one does to them."""
    model = two_adapters(tokenizer, {"router": router}, {"router": router})
    trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER, num_train_epochs=40, **LEVEL)
    trainer.prepare_phase_one()
    trainer.objective.targets = trainer.objective.targets - 2.0  # a random model has nothing to forget
    trainer.train()
    assert trainer.landed
    pairs = [Pair(row["prompt"], row["completion"]) for row in LATER]
    plain = chat_or_plain(tokenizer, as_chat=False)  # as the trainer of the task asks

    def gap() -> float:
        means = [row.mean() for row in score_answers(trainer.model.eval(), plain, pairs).log_probs]
        return float((torch.stack(means) - trainer.objective.targets).abs().mean())

    together = gap()
    assert together <= 0.25
    trainer.model.set_adapter("later")
    assert gap() > together + 0.1


def test_the_others_act_as_they_will_be_asked(tmp_path, tokenizer):
    """Gated without the entropies of the training, and without dropout."""
    model = two_adapters(tokenizer, {"lora_dropout": 0.5})
    trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    trainer.prepare_phase_one()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    gates = {}
    for kind, shift in (("own", 0.0), ("shifted", 5.0)):
        trainer.hidden_states(trainer.model.train(), {**batch, "entropy": batch["entropy"] + shift})
        gates[kind] = dict(trainer.gating.state.gates)
    with torch.no_grad():
        trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    asked = trainer.gating.state.gates
    assert torch.equal(gates["own"]["default"], asked["default"])
    assert torch.equal(gates["shifted"]["default"], asked["default"])
    assert not torch.equal(gates["shifted"]["later"], gates["own"]["later"])
    passes = [trainer.hidden_states(trainer.model.train(), batch) for _ in range(2)]
    assert torch.equal(*passes)


def test_phase_one_is_that_of_the_trained_adapter(tmp_path, tokenizer):
    """An earlier adapter with another memory of the text does not fit the router of the later one."""
    weights = []
    for active in (["later", "default"], ["later"]):
        model = two_adapters(tokenizer, {"router_half_life": 40.0})
        model.base_model.set_adapter(active)
        trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
        datasets.config.HF_DATASETS_CACHE = tmp_path / f"cache-{len(active)}"
        trainer.prepare_phase_one()
        weights.append(
            {name: value for name, value in of(adapter_state(trainer), "later").items() if "router" in name}
        )
    assert weights[0] and any(value.any() for value in weights[0].values())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resuming_changes_nothing_and_activates_both(tmp_path, tokenizer):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    options |= SGD
    whole = make_trainer(
        tmp_path / "whole", tokenizer, model=two_adapters(tokenizer), forget=LATER, retain=retain_rows(4), **options
    )
    whole.train()
    rest = make_trainer(
        tmp_path / "rest", tokenizer, model=two_adapters(tokenizer), forget=LATER, retain=retain_rows(4), **options
    )
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert rest.state.global_step == whole.state.global_step == 4
    assert rest.model.active_adapters == ["later", "default"]
    learning = [name for name, weight in rest.model.named_parameters() if weight.requires_grad]
    assert learning and all(".later." in name for name in learning)
    expected = adapter_state(whole)
    for name, value in adapter_state(rest).items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_entropies_of_two_orders(tmp_path, tokenizer):
    model = two_adapters(tokenizer, {"inference_entropy": "base", "entropy_q": 2.0, "entropy_threshold": 0.5})
    with pytest.raises(ValueError, match=r"`entropy_q` is 1.5, but adapter 'default', which is active too .* has 2.0"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    model.set_adapter("later")
    assert make_trainer(tmp_path, tokenizer, model=model, forget=LATER).adapter_name == "later"


@pytest.mark.parametrize("earlier", [{"router": "static"}, {"router_layer": 0}], ids=["static", "gated"])
def test_an_earlier_adapter_below_the_router(tmp_path, tokenizer, earlier):
    model = two_adapters(tokenizer, earlier, {"router_layer": 1})
    with pytest.raises(ValueError, match=r"`router_layer` is 1, but adapter 'default', which .* layers from 0 up"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
