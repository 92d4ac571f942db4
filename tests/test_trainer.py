# SPDX-License-Identifier: Apache-2.0
"""Phase II as a user runs it: who learns, what is logged, and that batching, processes and resuming change nothing."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_setup import PEOPLE, adapter_state, forget_rows, make_args, make_trainer, retain_rows
from transformers import TrainerCallback

from alter_peft import AlterConfig, AlterUnlearnConfig, AlterUnlearnTrainer, UnlearnConfig
from alter_peft.losses import TokenScores
from alter_peft.row_texts import row_text
from alter_peft.subdomains import discover_subdomains
from alter_peft.trainer.counterfactuals import RouterText
from alter_peft.trainer.isolation import clip_by_source, norms_by_kind
from alter_peft.trainer.measuring import labelled_rows
from alter_peft.trainer.observations import observe, observe_beside
from alter_peft.trainer.terms import forget_term


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Phase I of one test must not be read by another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# SGD is linear in the gradients; Adam makes the sign of rounding errors a step where a gradient is zero
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.3,
    "shared_learning_rate": 0.3,
    "lr_scheduler_type": "linear",
}


class Recorder(TrainerCallback):
    """Keeps all weights after every step, and the clipped gradients before it."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})


def record_experts(trainer: AlterUnlearnTrainer) -> list[list[int]]:
    """The experts of every batch that will be collated; batches are collated in the order of their use."""
    collate, seen = trainer.data_collator, []

    def recording(examples):
        batch = collate(examples)
        seen.append(batch["expert"].tolist())
        return batch

    trainer.data_collator = recording
    return seen


def first_log(trainer: AlterUnlearnTrainer, step: int = 1) -> dict[str, float]:
    return next(log for log in trainer.state.log_history if log["step"] == step)


def assert_same_trajectory(one: Recorder, other: Recorder, atol: float) -> None:
    assert len(one.weights) == len(other.weights) > 2
    for before, after in zip(one.weights, other.weights, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(before[name], after[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    moved = {kind: largest_move(one, kind) for kind in (".alter_A.", ".forget_0", ".forget_1", ".retain")}
    assert min(moved.values()) > 100 * atol, f"too still to tell: {moved}"


def largest_move(recorder: Recorder, part: str) -> float:
    first, last = recorder.weights[0], recorder.weights[-1]
    return max((last[name] - first[name]).abs().max().item() for name in first if part in name)


# ---- who learns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_each_step_moves_only_what_it_teaches(tmp_path, tokenizer, optim):
    """Bit for bit, although momentum and weight decay would move every expert that has a gradient, even of zero."""
    options = {"optim": optim, "optim_args": "momentum=0.9" if optim == "sgd" else None, "weight_decay": 0.1}
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, tokenizer, forget=forget_rows(2), adapter={}, others={"callbacks": [recorder]}, num_train_epochs=4,
        per_device_train_batch_size=1, structural_interval=2, **options,
    )  # fmt: skip
    batches = record_experts(trainer)
    trainer.train()
    assert len(recorder.weights) == 9
    orders = [tuple(sorted(batch)) for batch in batches[:8]]
    assert any(a != b for a, b in pairwise(orders))  # an expert rests after it has moved
    for step, (before, after) in enumerate(pairwise(recorder.weights), start=1):
        taught = batches[step - 1]
        for name in before:
            still = torch.equal(before[name], after[name])
            if ".alter_B." in name:
                kind = name.split(".")[-1]
                expert = 0 if kind == "retain" else 1 + int(kind.removeprefix("forget_"))
                assert still == (expert not in taught), (step, name)
            elif ".alter_A." in name:
                assert still == (step % 2 == 1), (step, name)
            else:
                assert still, (step, name)


def test_no_structural_term_leaves_A_alone(tmp_path, tokenizer):
    recorder = Recorder()
    options = {"structural_weight": 0.0, "weight_decay": 0.1, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, others={"callbacks": [recorder]}, **options)
    trainer.train()
    assert largest_move(recorder, ".alter_A.") == 0.0
    assert largest_move(recorder, ".retain") > 0.0
    assert "learning_rate/shared" not in first_log(trainer)


def test_base_is_restored_by_disabling(tmp_path, tokenizer, llama):
    ids = torch.tensor([tokenizer("Where does Alice live?")["input_ids"]])
    expected = llama(ids).logits.clone()
    trainer = make_trainer(tmp_path, tokenizer, model=llama, adapter={})
    trainer.train()
    trainer.model.eval()
    assert not torch.equal(trainer.model(ids).logits, expected)
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(ids).logits, expected)


def test_optimizer_groups(tmp_path, tokenizer):
    options = {"learning_rate": 2e-3, "shared_learning_rate": 3e-5, "weight_decay": 0.07}
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, **options)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"shared": 3e-5, "experts": 2e-3}
    assert [group["weight_decay"] for group in groups.values()] == [0.07, 0.07]
    in_groups = {id(p) for group in groups.values() for p in group["params"]}
    assert in_groups == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for p in groups["shared"]["params"]} == {id(p) for p in trainer.shared_matrices}


def test_each_group_is_clipped_by_itself(tmp_path, tokenizer):
    """A huge gradient in the experts leaves that of A as it is."""
    found = {}
    for weight in (1.0, 1e6):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path, tokenizer, adapter={"init_weights": False}, others={"callbacks": [recorder]}, max_steps=1,
            retain_weight=weight, structural_weight=5e-6, max_grad_norm=50.0,
        )  # fmt: skip
        trainer.train()
        gradients = recorder.gradients[0]
        shared = torch.cat([g.flatten() for name, g in gradients.items() if ".alter_A." in name])
        experts = torch.cat([g.flatten() for name, g in gradients.items() if ".alter_B." in name])
        found[weight] = shared, experts.norm().item(), first_log(trainer)
    small, huge = found[1.0], found[1e6]
    assert 0 < small[2]["grad_norm/shared"] < 50.0
    torch.testing.assert_close(huge[0], small[0])
    assert huge[0].norm().item() == pytest.approx(huge[2]["grad_norm/shared"], rel=1e-4)
    assert huge[2]["grad_norm/experts"] > 1e4
    assert huge[1] == pytest.approx(50.0, rel=1e-4)


def test_each_expert_is_clipped_by_itself(tmp_path, tokenizer):
    """A huge gradient in one expert leaves those of the others, of A and of the biases as they are."""
    model = make_trainer(tmp_path, tokenizer, adapter={"domains": ["home", "bread"], "bias": "alter_only"}).model
    sizes = {"shared": 0.1, "retain": 0.2, "forget_0": 1e6, "forget_1": 0.3, "other": 0.4}
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            part = "shared" if ".alter_A." in name else last if ".alter_B." in name else "other"
            parameter.grad = torch.ones_like(parameter)
            parts.setdefault(part, []).append(parameter.grad)
    for part, gradients in parts.items():
        whole = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_(sizes[part] / whole)
    norms = clip_by_source(model, 1.0)
    assert {part: pytest.approx(norm.item(), rel=1e-4) for part, norm in norms.items()} == {n: sizes[n] for n in parts}
    after = {part: torch.nn.utils.get_total_norm(gradients).item() for part, gradients in parts.items()}
    assert after == pytest.approx({part: min(sizes[part], 1.0) for part in parts}, rel=1e-4)


def test_norms_are_logged_by_kind_those_of_all_experts_as_one():
    norms = {"retain": torch.tensor(3.0), "forget_0": torch.tensor(4.0), "other": torch.tensor(2.0)}
    assert norms_by_kind(norms) == {"experts": 5.0, "other": 2.0}  # A had no gradient


# ---- logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs(tmp_path, tokenizer, accumulation):
    weights = {"forget_weight": 2.0, "retain_weight": 0.5, "structural_weight": 0.1}
    trainer = make_trainer(
        tmp_path, tokenizer, adapter={"init_weights": False}, max_steps=2, lr_scheduler_type="constant",
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, **weights,
    )  # fmt: skip
    trainer.train()
    log = first_log(trainer)
    terms = {name: log[f"loss/{name}"] for name in ("forget", "retain", "structural")}
    assert all(value > 0 for value in terms.values())
    total = sum(weights[f"{name}_weight"] * value for name, value in terms.items())
    assert log["loss"] == pytest.approx(total, rel=1e-4)
    assert log["tokens/low_entropy"] + log["tokens/high_entropy"] == pytest.approx(1.0)
    assert 0 < log["tokens/high_entropy"] < 1
    assert 0 <= log["router/forget_astray"] <= 1 and 0 <= log["router/retain_astray"] <= 1
    assert log["learning_rate/shared"] == 1e-3 and log["learning_rate/experts"] == 1e-2
    assert log["grad_norm/shared"] > 0 and log["grad_norm/experts"] > 0
    assert log["grad_norm"] == pytest.approx((log["grad_norm/shared"] ** 2 + log["grad_norm/experts"] ** 2) ** 0.5)
    assert 0 < log["probability/forget"] < 1 and 0 < log["probability/retain"] < 1


def test_logged_shares_are_of_tokens_however_a_step_is_cut(tmp_path, tokenizer):
    """And however many steps lie between two logs."""
    found = []
    for size, accumulation, every in ((4, 1, 2), (2, 2, 2), (1, 4, 2), (4, 1, 1)):
        trainer = make_trainer(
            tmp_path, tokenizer, adapter={"init_weights": False}, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, logging_steps=every, **SGD,
        )  # fmt: skip
        trainer.train()
        found.append([log for log in trainer.state.log_history if "tokens/low_entropy" in log])
    names = [name for name in found[0][0] if name.startswith(("tokens/", "probability/", "router/"))]
    assert len(names) == 6
    for cut in found[1:3]:
        assert [cut[0][name] for name in names] == pytest.approx([found[0][0][name] for name in names], rel=1e-4)
    each = [log["tokens/low_entropy"] for log in found[3]]
    assert min(each) < found[0][0]["tokens/low_entropy"] < max(each)


def test_a_router_that_is_turned_round_goes_astray(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=1)
    trainer.prepare()
    linear = trainer.gating.routers[0].alter_router["default"]
    linear.weight.data.zero_()
    linear.bias.data.copy_(torch.tensor([0.0, 9.0, 0.0]))  # everything to the first forget expert
    batches = record_experts(trainer)
    trainer.train()
    log = first_log(trainer)
    assert log["router/retain_astray"] == 1.0
    assert 0 < log["router/forget_astray"] < 1 and {1, 2} <= set(batches[0])


# ---- batching, processes, resuming ----------------------------------------------------------------------------------


def run(tmp_path: Path, tokenizer: Any, **options: Any) -> Recorder:
    recorder = Recorder()
    adapter = {"init_weights": False, "router_half_life": 8.0}  # of the bounds below
    # the gradient of one row's term is 5e6 here: a step as long as clipping allows would magnify rounding
    options = {"structural_weight": 1e-8, **SGD, **options}
    make_trainer(tmp_path, tokenizer, adapter=adapter, others={"callbacks": [recorder]}, **options).train()
    return recorder


def test_accumulation_changes_nothing(tmp_path, tokenizer):
    whole = run(tmp_path, tokenizer, per_device_train_batch_size=4, num_train_epochs=2)
    for size in (2, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        parts = run(tmp_path, tokenizer, num_train_epochs=2, **options)
        assert_same_trajectory(whole, parts, atol=2e-6)


@pytest.mark.parametrize("retain_loss", ["cross_entropy", "kl"])
def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer, retain_loss):
    options = {"retain_loss": retain_loss, "per_device_train_batch_size": 2}
    plain = run(tmp_path, tokenizer, **options)
    checkpointed = run(tmp_path, tokenizer, gradient_checkpointing=True, **options)
    assert_same_trajectory(plain, checkpointed, atol=2e-6)


@pytest.mark.parametrize("save_steps", [3, 4, 5])
def test_resuming_changes_nothing(tmp_path, tokenizer, save_steps):
    """From inside an epoch (four steps each), and from the border of two."""
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "adapter": {}}
    whole = make_trainer(tmp_path / "whole", tokenizer, save_steps=save_steps, **options)
    whole.train()
    torch.manual_seed(99)
    rest = make_trainer(tmp_path / "rest", tokenizer, save_steps=save_steps, **options)
    batches = record_experts(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole-checkpoints" / f"checkpoint-{save_steps}"))
    assert rest.state.global_step == whole.state.global_step == 8
    assert len(batches) <= 8 - save_steps + 4
    expected = adapter_state(whole)
    for name, value in adapter_state(rest).items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_an_epoch_entered_midway_keeps_its_order(tmp_path, tokenizer):
    """On several processes the data loader of a resumed epoch is another object, which nobody else tells the epoch."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=1)
    trainer.train()
    for epoch in (0.0, 1.25, 2.0):
        trainer.state.epoch = epoch
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        assert trainer._sampler.epoch == int(epoch)


# ---- forms of data and of models ------------------------------------------------------------------------------------


def chat(rows: Dataset, form: str) -> Dataset:
    """The same rows as conversations or as plain text."""

    def convert(row):
        asked = [{"role": "user", "content": row["prompt"]}]
        told = [{"role": "assistant", "content": row["completion"]}]
        forms = {
            "prompt-completion": {"prompt": row["prompt"], "completion": row["completion"]},
            "conversational": {"prompt": asked, "completion": told},
            "messages": {"messages": asked + told},
            "text": {"text": row["prompt"] + row["completion"]},
        }
        extra = {"domain": row["domain"]} if "domain" in row else {}
        return {**forms[form], **extra}

    return Dataset.from_list([convert(row) for row in rows])


@pytest.mark.parametrize("domain", [True, False])
@pytest.mark.parametrize("form", ["prompt-completion", "conversational", "messages", "text"])
def test_forms_of_data(tmp_path, tokenizer, form, domain):
    forget, retain = chat(forget_rows(), form), chat(retain_rows(), form)
    forget = forget if domain else forget.remove_columns("domain")
    adapter = {} if domain else {"num_forget_experts": 2}
    trainer = make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter=adapter, max_steps=1)
    assert trainer.alter_config.num_forget_experts == len(trainer.alter_config.domains) == 2
    if domain:
        assert trainer.alter_config.domains == ["home", "bread"]
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    for part in ("forget_0", "forget_1", "retain"):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith(part)), part
    row = trainer.train_dataset.forget[0]
    answer = tokenizer.decode([t for t in row["labels"] if t != -100])
    whole = form == "text"  # of a chat, the assistant's turns alone
    assert "Alice lives in Paris." in answer and ("Where does Alice" in answer) == whole


def test_mixed_forms(tmp_path, tokenizer):
    """Answers to forget, plain text to keep: each set is labelled in the way of its own form."""
    trainer = make_trainer(tmp_path, tokenizer, retain=chat(retain_rows(), "text"), adapter={}, max_steps=1)
    trainer.train()
    assert "What is the" not in tokenizer.decode([t for t in trainer.train_dataset.forget[0]["labels"] if t != -100])
    assert "What is the" in tokenizer.decode([t for t in trainer.train_dataset.retain[0]["labels"] if t != -100])


def test_sub_domains_are_discovered(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, forget=forget_rows().remove_columns("domain"), adapter={})
    truth = forget_rows()["domain"]
    found = trainer.train_dataset["expert"]
    assert len(set(found)) == trainer.alter_config.num_forget_experts
    assert min(found) == 1 and len(set(zip(found, truth, strict=True))) == len(set(found))


def test_what_is_saved_does_not_tell_what_discovered_sub_domains_are_about(tmp_path, tokenizer):
    topics = ("quokka wombat", "theremin ocarina")
    rows = [
        {"prompt": f"{topics[i % 2]}, {name}?", "completion": f" {topics[i % 2]} {what}."}
        for i, (name, what, _) in enumerate(PEOPLE)
    ]
    trainer = make_trainer(
        tmp_path, tokenizer, forget=Dataset.from_list(rows), adapter={"num_forget_experts": 2}, max_steps=1
    )
    trainer.train()
    trainer.save_model(tmp_path / "out")
    assert trainer.alter_config.domains == ["domain_1", "domain_2"]
    found = discover_subdomains([row_text(row, "text") for row in rows], 2, trainer.args.seed)[1]
    assert [subdomain.terms for subdomain in trainer.subdomains.values()] == found
    terms = {term for name in found for term in name.split("-")}
    assert terms == {word for topic in topics for word in topic.split()}
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"adapter_config.json", "README.md"} <= {file.name for file in files}
    for file in files:
        assert not [term for term in terms if term.encode() in file.read_bytes().lower()], file.name


def test_rows_by_sub_domain(tmp_path, tokenizer):
    """Which expert learned what can be looked up: by the column's names, or by the terms of what was discovered."""
    named = make_trainer(tmp_path, tokenizer, adapter={"domains": ["bread", "home"]})
    assert named.subdomains == {"bread": ([1, 3, 5, 7], None), "home": ([0, 2, 4, 6], None)}
    found = make_trainer(
        tmp_path, tokenizer, forget=forget_rows().remove_columns("domain"), adapter={"num_forget_experts": 2}
    )
    experts = found.train_dataset["expert"]
    for d, (name, subdomain) in enumerate(found.subdomains.items(), start=1):
        assert name == f"domain_{d}" and subdomain.terms
        assert subdomain.rows == [row for row, expert in enumerate(experts) if expert == d]


def test_names_of_an_adapter_are_never_guessed(tmp_path, tokenizer):
    """Not from the order of the rows, nor for other rows: an expert would learn what another one had learned."""
    rows = forget_rows().remove_columns("domain")
    first = make_trainer(tmp_path, tokenizer, forget=rows, adapter={"num_forget_experts": 2})
    reversed_rows = rows.select(range(len(rows) - 1, -1, -1))
    for forget in (reversed_rows, retain_rows(), rows):
        retain = rows if forget.column_names != rows.column_names or forget[0] == retain_rows()[0] else None
        with pytest.raises(
            ValueError, match=r"`domains` is \['domain_1', 'domain_2'\], but .*no column `domain`.*Add it"
        ):
            make_trainer(tmp_path, tokenizer, model=first.model, forget=forget, retain=retain)
    column = {row: name for name, subdomain in first.subdomains.items() for row in subdomain.rows}
    known = rows.add_column("domain", [column[row] for row in range(len(rows))]).select(range(len(rows) - 1, -1, -1))
    again = make_trainer(tmp_path, tokenizer, model=first.model, forget=known)
    assert again.train_dataset["expert"] == first.train_dataset["expert"][::-1]


@pytest.mark.parametrize("domains", [["domain_1", "domain_2"], ["home", "bread"]])
def test_names_of_the_users_own_need_a_column(tmp_path, tokenizer, domains):
    with pytest.raises(ValueError, match="one of these names for each row"):
        make_trainer(tmp_path, tokenizer, forget=forget_rows().remove_columns("domain"), adapter={"domains": domains})


def test_a_single_sub_domain_needs_no_column(tmp_path, tokenizer):
    rows = forget_rows().remove_columns("domain")
    first = make_trainer(tmp_path, tokenizer, forget=rows, adapter={"num_forget_experts": 1})
    assert first.alter_config.domains == ["domain_1"]
    again = make_trainer(tmp_path, tokenizer, model=first.model, forget=rows.select([3, 1]))
    own = make_trainer(tmp_path, tokenizer, forget=rows, adapter={"domains": ["people"]})
    assert again.train_dataset["expert"] == [1, 1] and own.train_dataset["expert"] == [1] * 8
    assert own.alter_config.domains == ["people"]


def test_a_run_with_discovered_sub_domains_is_resumed(tmp_path, tokenizer):
    """From its own arguments, as any run: the base model gets a fresh adapter that the checkpoint fills."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "adapter": {"num_forget_experts": 2}}
    forget = forget_rows().remove_columns("domain")
    make_trainer(tmp_path / "run", tokenizer, forget=forget, **options).train()
    rest = make_trainer(tmp_path / "run", tokenizer, forget=forget, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "run-checkpoints" / "checkpoint-1"))
    assert rest.state.global_step == 2


def test_a_half_precision_base_has_the_structural_term(tmp_path, tokenizer):
    """Its gradient is exact there (tests/test_structural.py)."""
    model = make_llama(len(tokenizer)).bfloat16()
    trainer = make_trainer(tmp_path, tokenizer, model=model, adapter={}, max_steps=2, structural_weight=0.1)
    assert trainer.structural_weight == 0.1 and all(A.requires_grad for A in trainer.shared_matrices)
    trainer.create_model_card()
    assert "| `structural_weight` | 0.1 |" in (tmp_path / "README.md").read_text()
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    for part in (".alter_A.", ".alter_B."):
        assert any(not torch.equal(before[name], after[name]) for name in after if part in name)


def test_base_model_alone(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1)
    assert trainer.alter_config.domains == ["home", "bread"] and trainer.alter_config.entropy_threshold == 1.2
    trainer.train()
    assert trainer.alter_config.entropy_threshold == 1.2  # to the last bit: it is saved


def test_peft_model_given(tmp_path, tokenizer, llama):
    model = get_peft_model(llama, AlterConfig(num_forget_experts=3, r=4, task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=2)
    assert trainer.model is model
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    assert trainer.alter_config.domains[:2] == ["home", "bread"] and len(trainer.alter_config.domains) == 3
    for name in after:
        if name.endswith("forget_2"):  # beyond the sub-domains of the data
            assert torch.equal(before[name], after[name])
    assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith("forget_1"))


@pytest.mark.parametrize("router", ["static", "entropy"])
def test_other_routers(tmp_path, tokenizer, router):
    trainer = make_trainer(tmp_path, tokenizer, adapter={"router": router}, max_steps=2)
    before = adapter_state(trainer)
    trainer.train()
    assert ("router/forget_astray" in first_log(trainer)) == (router == "entropy")
    after = adapter_state(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in after if name.endswith("forget_1"))


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_forms_of_the_losses_differ(tmp_path, tokenizer):
    found = {}
    for forget_loss in ("hinge", "ihl"):
        for retain_loss in ("cross_entropy", "kl"):
            trainer = make_trainer(
                tmp_path, tokenizer, adapter={"init_weights": False}, max_steps=1, forget_loss=forget_loss,
                retain_loss=retain_loss,
            )  # fmt: skip
            trainer.train()
            log = first_log(trainer)
            found[forget_loss, retain_loss] = log["loss/forget"], log["loss/retain"]
    assert found["hinge", "kl"][0] == found["hinge", "cross_entropy"][0] != found["ihl", "kl"][0]
    assert found["hinge", "kl"][1] != found["hinge", "cross_entropy"][1] == found["ihl", "cross_entropy"][1]
    assert found["ihl", "kl"][1] > 0


def test_kl_of_a_fresh_adapter_is_zero(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=1, retain_loss="kl")
    trainer.train()
    assert first_log(trainer)["loss/retain"] == pytest.approx(0.0, abs=1e-5)


def test_a_retain_expert_at_rest_costs_no_pass(tmp_path, tokenizer, caplog):
    """The default: retained text is the base model's own, and the forget experts learn what they learn beside it."""
    assert AlterUnlearnConfig.retain_weight == 0 and UnlearnConfig.retain_weight == 1
    states, logs, alone = [], [], {**SGD, "structural_weight": 0}
    for weight in (1.0, 0.0):
        trainer = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=1, retain_weight=weight, **alone)
        trainer.prepare()
        rows = []  # of each pass that is differentiated
        handle = trainer.scored.decoder.register_forward_hook(
            lambda m, a, out, rows=rows: rows.append(len(out[0]) * out[0].requires_grad)
        )
        trainer.train()
        handle.remove()
        assert max(rows) == (8 if weight else 4)
        states.append(adapter_state(trainer))
        logs.append(first_log(trainer))
    for name, value in states[1].items():
        if name.endswith("alter_B.default.retain"):
            assert not value.any()
        else:
            torch.testing.assert_close(value, states[0][name], rtol=1e-4, atol=1e-6)
    assert logs[1]["loss/retain"] == 0 and "probability/retain" in logs[0] and "probability/retain" not in logs[1]
    assert logs[1]["loss/forget"] == pytest.approx(logs[0]["loss/forget"], rel=1e-5)
    assert "lets retained text into the forget experts" not in caplog.text
    make_trainer(tmp_path, tokenizer, adapter={"router": "static"}, retain_weight=0.0)
    assert "`router='static'` lets retained text into the forget experts" in caplog.text


# ---- files and evaluation -------------------------------------------------------------------------------------------


def test_saved_adapter(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path / "run", tokenizer, adapter={}, num_train_epochs=3)
    trainer.train()
    trainer.save_model(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert sum(name.endswith((".safetensors", ".bin")) for name in names) == 1
    assert not [name for name in names if name.startswith((".", "tmp"))]
    assert all((tmp_path / "out" / name).is_file() for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import alter_peft" in card and "1. home\n2. bread" in card and "base_model: " not in card
    assert f'from_pretrained("{tmp_path / "out"}")' in card
    state = trainer.state
    assert f"| `epochs trained` | {state.epoch:g} ({state.global_step} steps) |" in card
    assert "## Before and after" in card and all(line in card for line in trainer.summary().lines)
    assert "forget_level" not in card  # which the paper's loss does not have
    ids = torch.tensor([tokenizer("Where does Alice live? Alice lives in")["input_ids"]])
    again = PeftModel.from_pretrained(make_llama(len(tokenizer)), tmp_path / "out").eval()
    trainer.model.eval()
    assert torch.equal(again(ids).logits, trainer.model(ids).logits)
    assert not torch.allclose(again(ids).logits, make_llama(len(tokenizer))(ids).logits)
    assert again.peft_config["default"].domains == ["home", "bread"]
    assert again.peft_config["default"].entropy_threshold == trainer.alter_config.entropy_threshold


def test_saving_again_replaces(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path / "run", tokenizer, adapter={}, max_steps=1)
    trainer.save_model(tmp_path / "out")
    fresh = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trainer.train()
    trainer.save_model(tmp_path / "out")
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(not torch.equal(fresh[name], trained[name]) for name in fresh)


def test_checkpoints_are_whole(tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    make_trainer(tmp_path / "run", tokenizer, adapter={}, **options).train()
    assert {path.name for path in (tmp_path / "run").iterdir()} == set()
    names = {path.name for path in (tmp_path / "run-checkpoints" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "optimizer.pt"} <= names
    # which run it is of, and what that was begun with
    assert {name for name in names if name.startswith(".")} == {".run", ".begun-with.json"}


def test_evaluate(tmp_path, tokenizer):
    others = {"eval_dataset": retain_rows(5)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 5}
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, others=others, **options)
    before = trainer.evaluate()["eval_loss"]
    with trainer.model.disable_adapter():
        assert trainer.evaluate()["eval_loss"] == before  # a fresh adapter is the base
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) >= 2 and losses[-1] < before


# ---- phase I is cached ----------------------------------------------------------------------------------------------


def base_passes(trainer: AlterUnlearnTrainer) -> int:
    """How often phase I runs the base model."""
    calls = []
    handle = trainer.scored.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.prepare()
    handle.remove()
    return len(calls)


def test_phase_one_is_cached(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, adapter={})
    assert base_passes(first) > 0 and base_passes(first) == 0
    # without L_struct, which tries four tokens
    second = make_trainer(tmp_path, tokenizer, adapter={}, structural_weight=0.0)
    assert base_passes(second) == 0
    assert second.alter_config.entropy_threshold == first.alter_config.entropy_threshold
    rows = [(trainer.train_dataset.forget[0], trainer.train_dataset.retain[0]) for trainer in (first, second)]
    assert rows[0] == rows[1]
    router = [trainer.gating.routers[0].alter_router["default"].weight for trainer in (first, second)]
    assert torch.equal(*router) and router[0].any()
    assert len(list((tmp_path / "cache" / "alter_peft").iterdir())) == 1


def test_phase_one_runs_again_on_anything_else(tmp_path, tokenizer):
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={})) > 0
    other_base = make_llama(len(tokenizer))
    with torch.no_grad():
        other_base.model.layers[3].mlp.up_proj.weight[0, 0] += 0.5  # inside an adapted layer
    other_norm = make_llama(len(tokenizer))
    with torch.no_grad():
        other_norm.model.norm.weight[0] += 0.5
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={}, model=other_base)) > 0
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={}, model=other_norm)) > 0
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={}, forget=forget_rows(7))) > 0
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={}, retain=retain_rows(7))) > 0
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={"entropy_q": 2.0})) > 0
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={"entropy_quantile": 0.5})) > 0
    files = len(list((tmp_path / "cache" / "alter_peft").iterdir()))
    make_trainer(tmp_path, tokenizer, adapter={"init_weights": False}).prepare()  # the adapter's own
    assert len(list((tmp_path / "cache" / "alter_peft").iterdir())) == files == 7


def test_phase_one_finds_the_same_entropy_whatever_its_batches(tmp_path, tokenizer, monkeypatch):
    found = []
    for size in (1, 7):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache-{size}")
        trainer = make_trainer(tmp_path, tokenizer, adapter={}, per_device_eval_batch_size=size)
        assert base_passes(trainer) >= 16 // size
        found.append([torch.tensor(row["entropy"]) for row in trainer.train_dataset.forget])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_rates_and_weights(tmp_path):
    """The paper's but for eta_B, 1e-3 there, and the weight of the retain loss, 1 there."""
    args = AlterUnlearnConfig(output_dir=str(tmp_path), bf16=False)
    assert (args.learning_rate, args.shared_learning_rate) == (4e-3, 1e-5)
    assert (args.forget_weight, args.retain_weight, args.structural_weight) == (1.0, 0.0, 0.01)
    assert args.per_device_train_batch_size == 4


def test_the_level_raises_no_row_above_its_beginning(tmp_path, tokenizer):
    """A row that the model never knew must not be taught by unlearning it."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, num_train_epochs=8, forget_loss="level", forget_level=0.9)
    trainer.prepare()
    known = trainer.scored.label_log_probabilities(labelled_rows(trainer._forget), 4, base=True)
    start = torch.stack([row.mean() for row in known])
    torch.testing.assert_close(trainer.measured.targets, start)  # all far below the level
    trainer.train()
    assert max(log["probability/forget"] for log in trainer.state.log_history if "loss" in log) < 0.05


def test_calibration_measures_the_level(tmp_path, tokenizer):
    trainer = AlterUnlearnTrainer(
        make_llama(len(tokenizer)),
        make_args(tmp_path, forget_loss="level"),
        train_dataset=forget_rows(),
        retain_dataset=retain_rows(2),
        calibration_dataset=retain_rows(4).select([2, 3]),
        processing_class=tokenizer,
    )
    trainer.create_model_card()
    assert f"| `forget_level` | {trainer.args.guessed_level:.4g} (a guess) |" in (tmp_path / "README.md").read_text()
    trainer.prepare()
    known = trainer.scored.label_log_probabilities(labelled_rows(trainer._calibration), 4, base=True)
    assert len(known) == 2
    assert trainer.forget_level == pytest.approx(float(torch.stack([row.mean() for row in known]).mean().exp()))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| `forget_level` | {trainer.forget_level:.4g} (measured on `calibration_dataset`) |" in card
    assert trainer.measured.targets.max() <= math.log(trainer.forget_level) + 1e-6


def test_a_router_of_other_data_is_refused(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, adapter={"domains": ["home", "bread"]})
    first.prepare()
    swapped = [{**row, "domain": {"home": "bread", "bread": "home"}[row["domain"]]} for row in forget_rows()]
    other = make_trainer(tmp_path, tokenizer, model=first.model, forget=Dataset.from_list(swapped))
    with pytest.raises(ValueError, match=r"`model` has a router that sends .* it was fitted on other data"):
        other.prepare()


def test_a_static_router_evaluates_batches_of_any_size_after_training(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={"router": "static"}, max_steps=1)
    trainer.train()
    ids = torch.arange(4, 10).unsqueeze(0)
    assert torch.isfinite(trainer.model(input_ids=ids).logits).all()


def test_observed_averages_are_those_of_the_sample(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={})
    data, of = trainer._retain, (trainer.scored, "default", 1.5, 3)
    total = sum(len(ids) for ids in data["input_ids"])
    whole = observe(data, *of, sample=np.arange(total))
    sample = np.array([0, 1, total // 2, total - 1])
    part = observe(data, *of, sample=sample)
    assert whole.averages.shape[0] == total and whole.averages.any()
    torch.testing.assert_close(part.averages, whole.averages[sample])
    torch.testing.assert_close(part.entropy, whole.entropy)


def test_what_a_router_reads_of_texts_is_what_it_reads_of_rows(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={})
    rows = trainer._retain
    sample = np.array([0, 2, sum(len(ids) for ids in rows["input_ids"]) - 1])
    texts = [RouterText(ids, 0) for ids in rows["input_ids"]]
    beside = observe_beside(texts, trainer.scored, "default", 2, sample)
    torch.testing.assert_close(beside, observe(rows, trainer.scored, "default", 1.5, 3, sample).averages)


def test_labels_are_scored_in_the_pass_that_observes(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={})
    rows = trainer._retain
    found = observe(rows, trainer.scored, "default", 1.5, 3, np.arange(4), asked={0, len(rows) - 1}).log_probabilities
    known = trainer.scored.label_log_probabilities(labelled_rows(rows), 2, base=True)
    assert sorted(found) == [0, len(rows) - 1]
    torch.testing.assert_close([found[0], found[len(rows) - 1]], [known[0], known[-1]])


def test_a_router_is_known_again_in_another_precision(tmp_path, tokenizer):
    """The regression's weights differ then, but where it sends the tokens does not."""
    model = make_llama(len(tokenizer))
    first = make_trainer(tmp_path, tokenizer, model=model, adapter={"domains": ["home", "bread"]}, bf16=True)
    first.prepare()
    weight = first.gating.routers[0].alter_router["default"].weight.clone()
    again = make_trainer(tmp_path, tokenizer, model=first.model)
    again.prepare()
    assert torch.equal(again.gating.routers[0].alter_router["default"].weight, weight)


def test_phase_one_of_another_config_is_not_read(tmp_path, tokenizer):
    """The same weights at other positions are another model."""
    model = make_llama(len(tokenizer))
    found = []
    for theta in (10_000.0, 100.0):
        model.config.rope_parameters["rope_theta"] = theta
        other = type(model)(model.config)
        other.load_state_dict(model.state_dict())
        trainer = make_trainer(tmp_path, tokenizer, model=other.eval(), adapter={})
        trainer.prepare()
        found.append(trainer.train_dataset.forget["entropy"][0])
    assert found[0] != found[1]


def test_a_that_rested_learns_again(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, adapter={"init_weights": False}, structural_weight=0)
    assert not any(A.requires_grad for A in first.shared_matrices)
    again = make_trainer(tmp_path, tokenizer, model=first.model, max_steps=1)
    before = [A.detach().clone() for A in again.shared_matrices]
    again.train()
    assert not all(torch.equal(A, b) for A, b in zip(again.shared_matrices, before, strict=True))


def test_the_retain_rows_format_does_not_reach_evaluation(tmp_path, tokenizer):
    as_text = Dataset.from_dict({"text": [f"{row['prompt']}{row['completion']}" for row in retain_rows()]})
    losses = [
        make_trainer(tmp_path, tokenizer, retain=retain, adapter={}).evaluate(forget_rows().remove_columns("domain"))[
            "eval_loss"
        ]
        for retain in (None, as_text)
    ]
    assert losses[0] == losses[1]


def test_formatting_func_reaches_the_held_out_rows(tmp_path, tokenizer):
    rows = Dataset.from_list([{"question": r["prompt"], "reply": r["completion"]} for r in retain_rows()])
    forget = Dataset.from_list(
        [{"question": r["prompt"], "reply": r["completion"], "domain": r["domain"]} for r in forget_rows()]
    )
    others = {"formatting_func": lambda row: f"{row['question']}{row['reply']}"}
    for held_out in (rows, {"a": rows, "b": rows}):
        trainer = make_trainer(
            tmp_path, tokenizer, forget=forget, retain=rows, adapter={}, others={**others, "eval_dataset": held_out}
        )
        assert any(name.endswith("loss") for name in trainer.evaluate())


LEVEL: dict[str, Any] = {"forget_loss": "level", "optim": "adamw_torch", "learning_rate": 1e-2, "structural_weight": 0}


def test_training_ends_when_the_forget_rows_have_landed(tmp_path, tokenizer):
    """Whatever the number of epochs, and not before: the gap is that of the model as it will be asked."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, num_train_epochs=40, **LEVEL)
    trainer.prepare()
    trainer.measured = trainer.measured._replace(
        targets=trainer.measured.targets - 2.0
    )  # a random model has nothing to forget
    trainer.train()
    gaps = [entry["forget_gap"] for entry in trainer.state.log_history if "forget_gap" in entry]
    assert len(gaps) == trainer.state.epoch < 40 and trainer.reached
    assert gaps[-1] <= 0.25 < min(gaps[:-1])
    asked = []
    with torch.no_grad():
        trainer.model.eval()
        for row, target in zip(trainer._forget, trainer.measured.targets, strict=True):
            log_prob = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(dim=-1)
            labels = torch.tensor(row["labels"][1:])
            said = log_prob[labels != -100].gather(1, labels[labels != -100].unsqueeze(1)).mean()
            asked.append(abs(float(said - target)))
    assert sum(asked) / len(asked) == pytest.approx(gaps[-1], rel=1e-3)


def test_a_tolerance_of_none_trains_for_all_epochs(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, num_train_epochs=3, stopping_tolerance=None, **LEVEL)
    trainer.train()
    assert trainer.state.epoch == 3 and not trainer.reached
    landed = make_trainer(tmp_path, tokenizer, adapter={}, num_train_epochs=3, stopping_tolerance=100.0, **LEVEL)
    landed.train()
    assert landed.state.epoch == 1


def test_of_many_forget_rows_some_are_measured(tmp_path, tokenizer):
    """Drawn at random: every other row of domains in turn would be those of one domain."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={"init_weights": False}, **LEVEL)
    trainer.prepare()
    rows, targets, measuring = trainer._forget, trainer.measured.targets, trainer._measuring
    whole, some = trainer._mean_gap(8), trainer._mean_gap(4)
    assert some == trainer._mean_gap(4) and some != pytest.approx(whole)
    gaps = []
    for picked in combinations(range(8), 4):
        if picked not in ((0, 2, 4, 6), (1, 3, 5, 7)):
            measuring.rows = measuring.rows._replace(forget=rows.select(picked))
            trainer.measured = trainer.measured._replace(targets=targets[list(picked)])
            gaps.append(trainer._mean_gap(8))
    assert min(abs(gap - some) for gap in gaps) < 1e-5


@pytest.mark.parametrize(
    ("probed", "all_of_them", "measured"),
    [(0.6, 0.1, [2]), (0.4, 0.1, [2, 4]), (0.1, 0.3, [2, 4])],
    ids=["far", "near and there", "near and not there"],
)
def test_all_forget_rows_are_measured_once_some_are_near(
    tmp_path, tokenizer, monkeypatch, probed, all_of_them, measured
):
    asked = []
    monkeypatch.setattr("alter_peft.trainer.stopping.PROBED_ROWS", 2)
    monkeypatch.setattr("alter_peft.trainer.stopping.MAX_ROWS", 4)
    monkeypatch.setattr(
        "alter_peft.trainer.unlearn.UnlearnTrainer._mean_gap",
        lambda trainer, rows: asked.append(rows) or {2: probed, 4: all_of_them}[rows],
    )
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, num_train_epochs=1, stopping_tolerance=0.25, **LEVEL)
    trainer.train()
    assert asked == measured
    assert trainer.reached == (measured == [2, 4] and all_of_them <= 0.25)
    gaps = [entry["forget_gap"] for entry in trainer.state.log_history if "forget_gap" in entry]
    assert gaps == [all_of_them if len(measured) > 1 else probed]


def test_each_row_of_a_batch_comes_to_its_own_profile(tmp_path, tokenizer):
    """In whatever order, and twice if it is there twice."""
    calibration = retain_rows(8).select(range(4, 8))
    others = {"calibration_dataset": calibration}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        adapter={"init_weights": False},
        retain=retain_rows(4),
        forget_loss="profile",
        others=others,
    )
    trainer.prepare()
    picked = [5, 2, 5, 0]
    batch = trainer.data_collator([trainer.train_dataset[(row, 3 - k)] for k, row in enumerate(picked)])
    masks = trainer._masks(batch)
    log_prob = -(torch.rand(int(masks.labelled.sum()), generator=torch.Generator().manual_seed(0)) * 9)
    scores = TokenScores(log_prob, torch.zeros_like(log_prob))
    expected, sizes = 0.0, masks.labelled.sum(dim=1).tolist()
    for row, reached in zip(picked, log_prob.split(sizes), strict=False):
        distance = (reached.sort().values - trainer.measured.profiles[row]).abs()
        expected += float(torch.where(distance < 0.5, distance**2, distance - 0.25).sum())
    assert float(forget_term(scores, batch, masks, trainer.args.loss, {}, trainer.measured)) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_batch_before_the_training(tmp_path, tokenizer):
    """Phase I is run for it, and not again."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={})
    batch = next(iter(trainer.get_train_dataloader()))
    assert {"input_ids", "labels", "entropy", "expert", "row_id"} <= set(batch)
    assert len(batch["expert"]) == 8 and (batch["expert"] == 0).sum() == 4
    trainer.train()


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_data_sets_with_a_format(tmp_path, tokenizer, form):
    """They are read as the plain ones are."""
    found = []
    for chosen in (None, form):
        rows = {
            name: data.with_format(chosen) for name, data in (("forget", forget_rows()), ("retain", retain_rows()))
        }
        others = {"eval_dataset": retain_rows().with_format(chosen)}
        trainer = make_trainer(tmp_path, tokenizer, adapter={}, others=others, max_steps=1, **rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        found.append(adapter_state(trainer))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_tokenised_data_sets_with_a_format(tmp_path, tokenizer):
    def rows(texts):
        ids = [tokenizer(text)["input_ids"] for text in texts]
        return Dataset.from_dict({"input_ids": ids, "domain": ["home"] * len(ids)}).with_format("torch")

    forget, retain = rows(["Alice lives in Paris.", "Bob bakes bread."]), rows(["The sky is blue.", "Ice is cold."])
    trainer = make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter={}, max_steps=1)
    trainer.train()
    labels = [list(row["labels"]) for row in trainer.train_dataset.forget]
    assert trainer.state.global_step == 1 and labels == [list(map(int, row["input_ids"])) for row in forget]
