# SPDX-License-Identifier: Apache-2.0
"""A later adapter, trained while an earlier one is active: it learns what the two of them say together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from test_trainer import LEVEL, SGD
from trainer_setup import adapter_state, forget_rows, make_trainer, retain_rows
from transformers import TrainerCallback

from alter_peft import AlterConfig, UnlearnConfig, UnlearnTrainer
from alter_peft.evaluation import Pair, chat_or_plain, score_answers
from alter_peft.trainer.same_run import BEGUN_WITH


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
    trainer.prepare()
    trainer.measured = trainer.measured._replace(
        targets=trainer.measured.targets - 2.0
    )  # a random model has nothing to forget
    trainer.train()
    assert trainer.reached
    pairs = [Pair(row["prompt"], row["completion"]) for row in LATER]
    plain = chat_or_plain(tokenizer, as_chat=False)  # as the trainer of the task asks

    def gap() -> float:
        means = [row.mean() for row in score_answers(trainer.model.eval(), plain, pairs).log_probs]
        return float((torch.stack(means) - trainer.measured.targets).abs().mean())

    together = gap()
    assert together <= 0.25
    trainer.model.set_adapter("later")
    assert gap() > together + 0.1


@pytest.mark.parametrize("given", ["two adapters", "one that has learned", "a fresh one"])
def test_the_reference_of_npo_is_the_model_as_it_was_given(tmp_path, tokenizer, given):
    """Whatever acts in it, while phase I looks at the base; a fresh adapter is the base."""
    torch.manual_seed(4)
    options = {"entropy_quantile": 0.6, "init_weights": given == "a fresh one", "task_type": "CAUSAL_LM"}
    one = get_peft_model(make_llama(len(tokenizer)), AlterConfig(**options))
    model = two_adapters(tokenizer) if given == "two adapters" else one
    trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER, forget_loss="npo")
    trainer.prepare()

    def log_probs() -> torch.Tensor:
        found = []
        for row in trainer.train_dataset.forget:
            with torch.no_grad():
                log_p = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
            found.append(sum(log_p[t, label] for t, label in enumerate(row["labels"][1:]) if label != -100))
        return torch.stack(found)

    torch.testing.assert_close(trainer.measured.reference, log_probs(), atol=1e-4, rtol=1e-5)
    with trainer.model.disable_adapter():
        far = (trainer.measured.reference - log_probs()).abs().max() > 0.01
    assert far == (given != "a fresh one")


def test_the_others_act_as_they_will_be_asked(tmp_path, tokenizer):
    """Gated without the entropies of the training, and without dropout."""
    model = two_adapters(tokenizer, {"lora_dropout": 0.5})
    trainer = make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    trainer.prepare()
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
        trainer.prepare()
        weights.append(
            {name: value for name, value in of(adapter_state(trainer), "later").items() if "router" in name}
        )
    assert weights[0] and any(value.any() for value in weights[0].values())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(("trained", "weight"), [("later", 0.01), ("later", 0.0), ("default", 0.01)])
def test_resuming_changes_nothing_and_activates_both(tmp_path, tokenizer, trained, weight):
    """Also where A is at rest, and where the trained one lies at the root of the checkpoint."""
    other = {"later": "default", "default": "later"}[trained]
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    options |= {**SGD, "structural_weight": weight}

    def trainer(place):
        model = two_adapters(tokenizer, {"num_forget_experts": 1, "r": 4})
        model.base_model.set_adapter([trained, other])
        return make_trainer(tmp_path / place, tokenizer, model=model, forget=LATER, retain=retain_rows(4), **options)

    whole, rest = trainer("whole"), trainer("rest")
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "whole-checkpoints" / "checkpoint-3"))
    assert rest.state.global_step == whole.state.global_step == 4
    assert rest.model.active_adapters == [trained, other]
    learning = {name for name, value in rest.model.named_parameters() if value.requires_grad}
    assert learning == {name for name, value in whole.model.named_parameters() if value.requires_grad}
    assert learning and all(f".{trained}." in name for name in learning)
    expected = adapter_state(whole)
    for name, value in adapter_state(rest).items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_of_another_adapter(tmp_path, tokenizer):
    whole = make_trainer(tmp_path / "whole", tokenizer, adapter={}, max_steps=1, save_strategy="steps", save_steps=1)
    whole.train()
    rest = make_trainer(tmp_path / "rest", tokenizer, model=two_adapters(tokenizer), forget=LATER, max_steps=2)
    checkpoint = tmp_path / "whole-checkpoints" / "checkpoint-1"
    (checkpoint / BEGUN_WITH).unlink()  # an older version's, else its rows are found to be others before
    with pytest.raises(ValueError, match=r"checkpoint-1' has no adapter 'later'"):
        rest.train(resume_from_checkpoint=str(checkpoint))


def test_entropies_of_two_orders(tmp_path, tokenizer):
    model = two_adapters(tokenizer, {"inference_entropy": "base", "entropy_q": 2.0, "entropy_threshold": 0.5})
    with pytest.raises(ValueError, match=r"`entropy_q` is 1.5, but adapter 'default', which is active too .* has 2.0"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    model.set_adapter("later")
    assert make_trainer(tmp_path, tokenizer, model=model, forget=LATER).adapter_name == "later"


@pytest.mark.parametrize(
    ("earlier", "later", "reads", "adapts"),
    [
        ({"router": "static"}, {"router_layer": 1}, "later", "default"),
        ({"layers_to_transform": [0, 1]}, {"router_layer": 1}, "later", "default"),
        ({"router_layer": 1}, {"router": "static"}, "default", "later"),
        ({"router_layer": 1}, {"layers_to_transform": [0, 1]}, "default", "later"),
    ],
    ids=["static earlier", "earlier below", "static later", "later below"],
)
def test_an_adapter_below_the_router_of_another(tmp_path, tokenizer, earlier, later, reads, adapts):
    model = two_adapters(tokenizer, earlier, later)
    message = f"`router_layer` of adapter '{reads}' is 1, but adapter '{adapts}', which is active too, adapts layer 0"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)


def test_layers_that_are_not_adapted_do_not_count(tmp_path, tokenizer):
    model = two_adapters(tokenizer, {"router": "static", "layers_to_transform": [1]}, {"router_layer": 1})
    assert make_trainer(tmp_path, tokenizer, model=model, forget=LATER).adapter_name == "later"


def test_what_an_earlier_adapter_has_and_cannot_be_frozen(tmp_path, tokenizer):
    model = two_adapters(tokenizer, {"bias": "all"})
    with pytest.raises(ValueError, match=r"`bias` of adapter 'default', which is active too, is 'all'"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    model = two_adapters(tokenizer, {"modules_to_save": ["embed_tokens"]})
    with pytest.raises(ValueError, match=r"of one of the active adapters \['later', 'default'\] has the embeddings"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)


def test_an_error_leaves_the_model_as_it_was(tmp_path, tokenizer):
    model = two_adapters(tokenizer)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert any(learns for name, learns in before.items() if ".default." in name)
    with pytest.raises(ValueError, match="retain_dataset"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER, retain=LATER)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before


def test_frozen_adapters_are_refused(tmp_path, tokenizer):
    model = two_adapters(tokenizer)
    model.base_model.set_adapter(["later", "default"], inference_mode=True)
    with pytest.raises(ValueError, match="`model` has a frozen adapter"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="`model` has no active adapter"):
        make_trainer(tmp_path, tokenizer, model=model, forget=LATER)


@pytest.mark.parametrize("trained", ["later", "default"])
def test_the_best_checkpoint_is_the_trained_adapters(tmp_path, tokenizer, trained):
    """What lies at the root of a checkpoint is `default`, whichever was trained."""
    other = {"later": "default", "default": "later"}[trained]
    model = two_adapters(tokenizer, {"num_forget_experts": 1, "r": 4}, {"init_weights": False})
    model.base_model.set_adapter([trained, other])
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, forget=LATER, load_best_model_at_end=True,
        others={"eval_dataset": retain_rows(4)}, **{**SGD, **options},
    )  # fmt: skip
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    assert all(torch.equal(value, after[name]) for name, value in of(before, other).items())
    best = Path(str(trainer.state.best_model_checkpoint)) / ("" if trained == "default" else trained)
    saved = load_file(best / "adapter_model.safetensors")
    found = get_peft_model_state_dict(trainer.model, adapter_name=trained)
    assert found.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in found.items())
    assert trainer.model.active_adapters == [trained, other]


def test_the_card_lies_beside_its_adapter(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, model=two_adapters(tokenizer), forget=LATER, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "later" / "README.md").read_text()
    assert f'from_pretrained("{tmp_path / "saved" / "later"}")' in card and "| `learning_rate` |" in card
    assert "| `learning_rate` |" not in (tmp_path / "saved" / "README.md").read_text()
    trainer.hub_model_id = "someone/adapters"
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "later" / "README.md").read_text()
    assert 'from_pretrained("someone/adapters", subfolder="later")' in card


class Switches(TrainerCallback):
    """Asks the base model on the way, as users do: before the training, and after each step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        with model.disable_adapter():
            pass


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_what_is_frozen_stays_frozen_whatever_was_asked_meanwhile(tmp_path, tokenizer, weight):
    """`disable_adapter` lets all active adapters learn at its end; the steps are those of a run without it."""
    found = []
    for callbacks in ([], [Switches()]):
        others = {"callbacks": callbacks}
        options = {"num_train_epochs": 2, "structural_weight": weight, "others": others}
        trainer = make_trainer(tmp_path, tokenizer, model=two_adapters(tokenizer), forget=LATER, **options)
        before = adapter_state(trainer)
        if callbacks:
            with trainer.model.disable_adapter():
                pass
            trainer.model.base_model.set_adapter(["later", "default"])
        trainer.train()
        found.append(adapter_state(trainer))
        assert all(torch.equal(value, found[-1][name]) for name, value in of(before, "default").items())
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append(norms)
    state, norms, switched_state, switched_norms = found
    assert norms == switched_norms
    assert all(torch.equal(value, switched_state[name]) for name, value in state.items())


def test_a_rested_a_stays_so_whatever_was_asked_meanwhile(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, structural_weight=0.0)
    before = adapter_state(trainer)
    with trainer.model.disable_adapter():
        pass
    assert any(weight.requires_grad for weight in trainer.shared_matrices)
    trainer.train()
    after = adapter_state(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if ".alter_A." in name)
    assert not any(weight.requires_grad for weight in trainer.shared_matrices)


def lora_trainer(tmp_path, tokenizer, model):
    args = UnlearnConfig(str(tmp_path), bf16=False, report_to="none", save_strategy="no", as_chat=False, max_steps=2)
    rows = {"train_dataset": LATER, "retain_dataset": retain_rows(), "processing_class": tokenizer}
    return UnlearnTrainer(model, args, **rows)


@pytest.mark.parametrize("kind", ["alter", "lora"])
def test_training_again_after_another_adapter_was_made_active(tmp_path, tokenizer, kind):
    """All steps would run, and move nothing."""
    if kind == "alter":
        model = two_adapters(tokenizer)
        model.set_adapter("later")
        trainer: Any = make_trainer(tmp_path, tokenizer, model=model, forget=LATER, max_steps=2)
    else:
        model = get_peft_model(make_llama(len(tokenizer)), LoraConfig(task_type="CAUSAL_LM"), adapter_name="later")
        model.add_adapter("default", LoraConfig(task_type="CAUSAL_LM"))
        trainer = lora_trainer(tmp_path, tokenizer, model)
    trainer.train()
    trainer.model.set_adapter("default")
    with pytest.raises(
        ValueError, match=r"active adapters \['default'\].*train 'later'.*`model.set_adapter\('later'\)`"
    ):
        trainer.train()
    trainer.model.set_adapter("later")
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="later").items()}
    trainer.train()
    after = get_peft_model_state_dict(model, adapter_name="later")
    assert not all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_adapter_that_was_switched_off_is_not_trained(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=1)
    trainer.model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="no weight that learns any more"):
        trainer.train()
