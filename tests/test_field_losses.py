# SPDX-License-Identifier: Apache-2.0
"""The field's losses by hand, and what the trainer makes for them: other labels, alternate answers, a base model."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import LoraConfig
from test_unlearn import make_trainer
from trainer_setup import forget_rows, retain_rows
from trainer_setup import make_trainer as make_alter_trainer

from alter_peft import UnlearnConfig, UnlearnTrainer
from alter_peft.losses import (
    FORGET_LOSSES,
    TokenScores,
    activation_loss,
    dpo_loss,
    generic_labels,
    kl_to_base_loss,
    novice_labels,
    other_label_loss,
    steering_loss,
    undial_loss,
    weighted_gradient_ascent_loss,
)
from alter_peft.trainer.needs import MADE
from alter_peft.trainer.other_labels import share_of_own
from alter_peft.trainer.refusals import REFUSALS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_weighted_gradient_ascent_by_hand():
    log_prob = torch.tensor([0.6, 0.1]).log().requires_grad_()
    scores = TokenScores(log_prob, torch.zeros(2))
    torch.testing.assert_close(weighted_gradient_ascent_loss(scores), torch.tensor([0.6 * log(0.6), 0.1 * log(0.1)]))
    assert weighted_gradient_ascent_loss(scores, 0.0).equal(log_prob)  # gradient ascent
    weighted_gradient_ascent_loss(scores, 2.0).sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([0.36, 0.01])  # the weight has none of its own


def test_dpo_by_hand():
    """The alternate answer has gained half a nat and lost one, the row's own has lost one and two."""
    alternate, own = torch.tensor([-2.5, -6.0]), torch.tensor([-4.0, -5.0])
    found = dpo_loss(own, own + torch.tensor([1.0, 2.0]), alternate, alternate + torch.tensor([-0.5, 1.0]))
    assert found.tolist() == pytest.approx([-20 * log(1 / (1 + exp(-0.1 * lead))) for lead in (1.5, 1.0)])
    npo = FORGET_LOSSES["npo"].options["beta"]
    still = dpo_loss(own, own + 1, alternate, alternate, npo)
    assert still.tolist() == pytest.approx([-2 / npo * log(1 / (1 + exp(-npo)))] * 2)


def test_other_labels_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    labels, probabilities = torch.tensor([[1, 2]]), torch.tensor([[0.75, 0.25]])
    found = other_label_loss(logits, identity, labels, probabilities)
    assert found.tolist() == pytest.approx([-(0.75 * log(0.25) + 0.25 * log(0.125))])


def test_undial_by_hand():
    """The base's probabilities .8, .1, .1, whose label's odds fall by e^-beta; its point of rest are the new ones."""
    base, labels, beta = torch.tensor([[0.8, 0.1, 0.1]]).log(), torch.tensor([0]), log(16.0)
    target = torch.tensor([0.05, 0.1, 0.1]) / 0.25
    hidden = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    found = undial_loss(hidden, base, identity, identity, labels, beta)
    assert found.item() == pytest.approx(-float((target * torch.tensor([0.5, 0.3, 0.2]).log()).sum()))
    found.sum().backward()
    torch.testing.assert_close(hidden.grad[0], torch.tensor([0.5, 0.3, 0.2]) - target)
    rest = target.log().unsqueeze(0).requires_grad_()
    undial_loss(rest, base, identity, identity, labels, beta).sum().backward()
    assert rest.grad.abs().max() < 1e-6


def test_generic_labels_by_hand():
    """What the reinforced model favours more is out by five times as much; what it favours less stays."""
    base, reinforced = (
        torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0]]),
        torch.tensor([[3.5, 2.0, 9.0], [2.5, 1.0, 0.0]]),
    )
    assert generic_labels(base, reinforced).tolist() == [1, 0]
    assert generic_labels(base, reinforced, alpha=0.1).tolist() == [0, 0]


def test_novice_labels_are_those_of_a_loop():
    """As rohitgandikota/erasing-llm computes them: log-softmax at a temperature, a rising eta, the top k."""
    torch.manual_seed(0)
    own, expert, novice = torch.randn(3, 3, 6)
    labels, probabilities = novice_labels(own, expert, novice, eta=9.0, temperature=1.2, top_k=4)
    for t, eta in enumerate((1.0, 5.0, 9.0)):
        parts = [(part[t] / 1.2).log_softmax(dim=-1) for part in (own, expert, novice)]
        edited = [float(p) - eta * (float(e) - float(n)) for p, e, n in zip(*parts, strict=True)]
        best = sorted(range(6), key=lambda v: -edited[v])[:4]
        assert labels[t].tolist() == best
        total = sum(exp(edited[v] - edited[best[0]]) for v in best)
        assert probabilities[t].tolist() == pytest.approx([exp(edited[v] - edited[best[0]]) / total for v in best])


def test_activation_losses_by_hand():
    activations, direction = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0.6, 0.8])
    assert steering_loss(activations, direction, 5.0).tolist() == pytest.approx([(4 + 4) / 2, (9 + 16) / 2])
    assert activation_loss(activations, torch.tensor([[0.0, 0.0], [2.0, 0.0]])).tolist() == [2.5, 2.0]


def test_kl_under_a_head_of_the_base():
    torch.manual_seed(0)
    hidden, base, mine, other = torch.randn(5, 4), torch.randn(5, 4), torch.randn(7, 4), torch.randn(7, 4)
    found = kl_to_base_loss(hidden, base, lambda h: h @ mine.T, base_head=lambda h: h @ other.T)
    p, q = (base @ other.T).log_softmax(-1), (hidden @ mine.T).log_softmax(-1)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1))


# ---- in the trainer -------------------------------------------------------------------------------------------------

OF_FIELD = [name for name, loss in FORGET_LOSSES.items() if loss.needs & MADE]
DEPTH = 0.75  # layer 3 of 4, which ALTER adapts, too


def moved(trainer: UnlearnTrainer) -> None:
    """Away from the model that the trainer was given."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)


def answers_of(model, batch, rows, layer=None):
    """For each of some rows: logits, labels and a layer's output at the positions that predict a label."""
    found = []
    for row in rows:
        ids = batch["input_ids"][row : row + 1]
        out = model(input_ids=ids, attention_mask=batch["attention_mask"][row : row + 1], output_hidden_states=True)
        places = [t for t in range(ids.shape[1] - 1) if batch["labels"][row, t + 1] != -100]
        labels = [int(batch["labels"][row, t + 1]) for t in places]
        found.append((out.logits[0, places], labels, out.hidden_states[layer][0, places] if layer else None))
    return found


def total(logits, labels):
    return logits.log_softmax(-1)[range(len(labels)), labels].sum()


def expected_forget(name, trainer, batch, base, chosen):
    """The forget term from logits, row by row."""
    rows = answers_of(trainer.model, batch, range(4), layer=3)
    others = answers_of(trainer.model, batch, range(8, 12)) if "alternate" in batch else None
    measured, options = trainer.measured, FORGET_LOSSES[name].options
    if name == "undial":
        losses = []
        for (logits, labels, _), (of_base, _, _) in zip(rows, answers_of(base, batch, range(4)), strict=True):
            adjusted = of_base.detach().clone()
            adjusted[range(len(labels)), labels] -= options["beta"]
            losses.append(-(adjusted.softmax(-1) * logits.log_softmax(-1)).sum(-1))
        return torch.cat(losses).mean()
    if name == "rmu":
        steered = [(h - options["coefficient"] * measured.direction).square().mean(-1) for _, _, h in rows]
        return torch.cat(steered).mean()
    if name == "random_answers":
        return -torch.cat([torch.log_softmax(z, -1)[range(len(y)), y] for z, y, _ in others]).mean()
    if name in ("idkdpo", "altpo"):
        losses = []
        for number, ((z, y, _), (a, b, _)) in enumerate(zip(rows, others, strict=True)):
            place, beta = chosen[number], options["beta"]
            lead = total(a, b) - measured.alternate_reference[place] - (total(z, y) - measured.reference[place])
            losses.append(-2 / beta * torch.nn.functional.logsigmoid(beta * lead))
        return torch.stack(losses).mean()
    labelled = []
    for number, (logits, _, _) in enumerate(rows):
        wanted, share = (part[chosen[number]] for part in (measured.other_labels, measured.label_probabilities))
        labelled.append(-(share * logits.log_softmax(-1).gather(-1, wanted)).sum(-1))
    if name == "elm":
        fluent = [-total(z, y) / len(y) for z, y, _ in others]
        return torch.stack([one.mean() + other for one, other in zip(labelled, fluent, strict=True)]).mean()
    return torch.cat(labelled).mean()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("name", OF_FIELD)
def test_the_loss_is_that_of_a_loop_over_all_logits(tokenizer, tmp_path, name, lora):
    retain_loss = {"rmu": "activations", "undial": "kl"}.get(name, "cross_entropy")
    options = {"activation_depth": 0.5, "retain_loss": retain_loss}
    model = make_llama(len(tokenizer))
    base = make_llama(len(tokenizer))
    torch.manual_seed(0)
    if lora:
        trainer = make_trainer(tokenizer, tmp_path, name, **options)
    else:
        trainer = make_trainer(tokenizer, tmp_path, name, model=model, lora=False, **options)
    trainer.prepare()
    moved(trainer)
    chosen = [5, 0, 3, 2]
    batch = trainer.data_collator([trainer.train_dataset[(i, 3 - k)] for k, i in enumerate(chosen)])
    assert len(batch["labels"]) == (12 if "alternate" in batch else 8)
    with torch.no_grad():
        expected = expected_forget(name, trainer, batch, base, chosen)
        kept, of_base = (answers_of(one, batch, range(4, 8), layer=3) for one in (trainer.model, base))
        retain = []
        for (z, y, h), (z_base, _, h_base) in zip(kept, of_base, strict=True):
            if retain_loss == "activations":
                retain.append((h - h_base).square().mean(-1))
            elif retain_loss == "kl":
                p = z_base.log_softmax(-1)
                retain.append((p.exp() * (p - z.log_softmax(-1))).sum(-1))
            else:
                retain.append(-z.log_softmax(-1)[range(len(y)), y])
        expected = expected + torch.cat(retain).mean()
        _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = 1
        found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def made(tokenizer, folder, name, **options):
    trainer = make_trainer(tokenizer, folder, name, **options)
    trainer.prepare()
    return trainer


def shown(tokenizer, rows):
    """The answers of rows as tokens."""
    labels = ([i for i in row["labels"] if i != -100] for row in rows)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in labels]


def test_refusals_and_other_answers_are_drawn_by_the_seed(tokenizer, tmp_path):
    first, again, other = (made(tokenizer, tmp_path, "idkdpo", seed=seed).train_dataset for seed in (1, 1, 2))
    said = shown(tokenizer, first.alternates)
    assert all(text in REFUSALS for text in said) and len(set(said)) > 4
    assert said == shown(tokenizer, again.alternates) != shown(tokenizer, other.alternates)
    assert [row["expert"] for row in first.alternates] == first.forget["expert"]
    asked = [row["input_ids"][: row["labels"].count(-100)] for row in first.forget]
    assert asked == [row["input_ids"][: row["labels"].count(-100)] for row in first.alternates]
    answers = [row["completion"].strip() for row in retain_rows()]
    others = shown(tokenizer, made(tokenizer, tmp_path, "random_answers").train_dataset.alternates)
    assert all(text in answers for text in others)


@pytest.mark.parametrize("name", ["altpo", "elm"])
def test_made_up_answers_are_sampled_by_the_seed(tokenizer, tmp_path, name):
    """And drawing them leaves the training's own random state as it was."""
    first, again = (made(tokenizer, tmp_path, name).train_dataset.alternates for _ in range(2))
    assert shown(tokenizer, first) == shown(tokenizer, again)
    assert len(set(shown(tokenizer, first))) > 4
    longest = max(len(row["labels"]) for row in made(tokenizer, tmp_path, name).train_dataset.forget)
    assert all(sum(label != -100 for label in row["labels"]) <= 3 * longest for row in first)


def test_the_column_alternate_takes_the_place_of_what_would_be_made(tokenizer, tmp_path, monkeypatch):
    rows = forget_rows().add_column("alternate", [f"Nobody knows {number}." for number in range(8)])
    monkeypatch.setattr("test_unlearn.forget_rows", lambda: rows)
    for name in ("idkdpo", "altpo", "random_answers", "elm"):
        assert shown(tokenizer, made(tokenizer, tmp_path, name).train_dataset.alternates) == rows["alternate"][:]
    monkeypatch.setattr("test_unlearn.forget_rows", lambda: forget_rows().add_column("alternate", ["a"] * 7 + [None]))
    with pytest.raises(ValueError, match="`train_dataset` has no `alternate` in row 7"):
        make_trainer(tokenizer, tmp_path, "idkdpo")


def test_alternate_answers_need_prompts_and_room(tokenizer, tmp_path, monkeypatch):
    texts = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in forget_rows()]})
    with pytest.raises(
        ValueError, match=r"windows of `max_length` tokens, but the forget loss compares whole answers"
    ):
        make_trainer(tokenizer, tmp_path, "idkdpo", max_length=12)
    retain = Dataset.from_dict({"text": [row["completion"] for row in retain_rows()]})
    with pytest.raises(ValueError, match="`retain_dataset` has rows without a completion"):
        make_trainer(tokenizer, tmp_path, "random_answers", retain=retain)
    monkeypatch.setattr("test_unlearn.forget_rows", lambda: forget_rows().add_column("alternate", ["words " * 30] * 8))
    with pytest.raises(
        ValueError, match=r"Row 0 of `train_dataset` has \d+ tokens with its alternate .*`max_length`=30"
    ):
        made(tokenizer, tmp_path, "altpo", max_length=30)
    monkeypatch.setattr("test_unlearn.forget_rows", lambda: texts)
    with pytest.raises(ValueError, match=r"`train_dataset` has rows without a prompt.*'refusals'"):
        make_trainer(tokenizer, tmp_path, "idkdpo")
    trainer = made(tokenizer, tmp_path, "elm")  # goes on from the whole text
    row, other = trainer.train_dataset.forget[0], trainer.train_dataset.alternates[0]
    asked = other["labels"].count(-100)
    assert other["input_ids"][:asked] == row["input_ids"][:asked] and asked == len(row["input_ids"]) - 1


def test_a_model_reinforced_on_the_forget_rows_favours_them(tokenizer, tmp_path, caplog, monkeypatch):
    """So generic tokens are seldom the rows' own; where nothing more was learned they are the base's choice."""
    trainer = make_trainer(tokenizer, tmp_path, "whp", forget_loss_kwargs={"epochs": 12, "learning_rate": 1e-2})
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.prepare()
    assert all(weight.equal(before[name]) for name, weight in trainer.model.named_parameters())
    own = [torch.tensor([i for i in row["labels"] if i != -100]) for row in trainer.train_dataset.forget]
    found = [labels.squeeze(-1) for labels in trainer.measured.other_labels]
    rows = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset.forget]
    assert share_of_own(rows, found) < 0.2 and share_of_own(rows, own) == 1.0
    assert "of the generic tokens are the rows' own" not in caplog.text
    monkeypatch.setattr("alter_peft.trainer.other_labels.TOO_MANY", -1.0)
    still = made(tokenizer, tmp_path, "whp", forget_loss_kwargs={"epochs": 1, "learning_rate": 1e-9})
    assert "of the generic tokens are the rows' own" in caplog.text
    base = make_llama(len(tokenizer))
    for row, labels in zip(still.train_dataset.forget, still.measured.other_labels, strict=True):
        logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        places = [t for t, label in enumerate(row["labels"][1:]) if label != -100]
        assert float((logits[places].argmax(-1) == labels.squeeze(-1)).float().mean()) > 0.9


def test_a_loss_with_alternates_is_a_mean_over_the_whole_step(tokenizer, tmp_path):
    def weights(**sizes):
        trainer = make_trainer(tokenizer, tmp_path, "random_answers", optim="sgd", max_steps=2, **sizes)
        trainer.train()
        return torch.cat([w.detach().flatten() for w in trainer.model.parameters() if w.requires_grad])

    whole = weights(per_device_train_batch_size=4)
    parts = weights(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["idkdpo", "random_answers", "undial"])
def test_alters_experts_learn_from_alternates_of_their_own_rows(tokenizer, tmp_path, name):
    """And the retain expert from none of them."""
    trainer = make_alter_trainer(tmp_path, tokenizer, adapter={}, forget_loss=name, retain_weight=0.0)
    trainer.train()
    bank = next(iter(trainer.scored.layers_of("default"))).alter_B["default"]
    retain, *forget = bank.experts()
    assert not retain.any() and all(expert.any() for expert in forget)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all({"probability/forget", "router/forget_astray"} <= log.keys() for log in logs)


def test_activations_must_be_of_a_layer_that_what_is_trained_reaches(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"`activation_depth` is 0.22, layer 0 of 4, but what is trained begins at layer"
    ):
        make_alter_trainer(tmp_path, tokenizer, adapter={}, forget_loss="rmu")
    lora = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[3])
    args = UnlearnConfig(str(tmp_path), forget_loss="rmu", bf16=False, report_to="none", activation_depth=0.5)
    with pytest.raises(ValueError, match="what is trained begins at layer 3"):
        UnlearnTrainer(
            make_llama(len(tokenizer)), args, train_dataset=forget_rows(), retain_dataset=retain_rows(),
            peft_config=lora, processing_class=tokenizer,
        )  # fmt: skip
    for depth in (-0.1, 1.0, "deep"):
        with pytest.raises(ValueError, match=r"`activation_depth` is .*at least 0 and below 1"):
            UnlearnConfig(str(tmp_path), activation_depth=depth)


def test_activations_under_gradient_checkpointing(tokenizer, tmp_path):
    def weights(**options):
        trainer = make_trainer(
            tokenizer, tmp_path, "rmu", retain_loss="activations", activation_depth=0.5, max_steps=2, optim="sgd",
            **options,
        )  # fmt: skip
        trainer.train()
        return torch.cat([w.detach().flatten() for w in trainer.model.parameters() if w.requires_grad])

    torch.testing.assert_close(weights(gradient_checkpointing=True), weights(), atol=1e-6, rtol=1e-5)


def test_an_option_that_is_a_text(tmp_path):
    novice = {"novice": "Someone who has never heard of Ida wrote this:"}
    assert UnlearnConfig(str(tmp_path), forget_loss="elm", forget_loss_kwargs=novice).loss_options["eta"] == 1000.0
    with pytest.raises(ValueError, match=r"`forget_loss_kwargs\['novice'\]` is 3, but must be a text"):
        UnlearnConfig(str(tmp_path), forget_loss="elm", forget_loss_kwargs={"novice": 3})
