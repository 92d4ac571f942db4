# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import LoraConfig
from trainer_setup import forget_rows, retain_rows
from trl import SFTConfig, SFTTrainer

from alter_peft import AlterConfig, UnlearnConfig, UnlearnTrainer
from alter_peft.benchmark.teaching import LabelledTrainer
from alter_peft.losses import FORGET_LOSSES, ForgetBatch, TokenScores
from alter_peft.trainer.needs import MADE, alternates_of
from alter_peft.trainer.terms import forget_batch
from alter_peft.tuner.decoder import last_hidden_states


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


UNSEEN = Dataset.from_list([{"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."}] * 2)


def make_trainer(
    tokenizer, folder, forget_loss="ihl", retain=None, model=None, lora=True, **options
) -> UnlearnTrainer:
    defaults = {
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "stopping_tolerance": None, "num_train_epochs": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    return UnlearnTrainer(
        make_llama(len(tokenizer)) if model is None else model,
        UnlearnConfig(output_dir=str(folder), forget_loss=forget_loss, **{**defaults, **options}),
        train_dataset=forget_rows(),
        retain_dataset=retain_rows() if retain is None else retain,
        calibration_dataset=UNSEEN if forget_loss in ("level", "profile", "tokens", "soft_targets") else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora and model is None else None,
        processing_class=tokenizer,
    )


def test_a_head_that_is_not_known_is_refused(tokenizer, tmp_path, monkeypatch):
    def refuse(*args):
        raise ValueError("no such head")

    monkeypatch.setattr("alter_peft.scoring.check_head", refuse)
    with pytest.raises(ValueError, match="no such head"):
        make_trainer(tokenizer, tmp_path)


def by_hand() -> ForgetBatch:
    """Two rows of two tokens and of one, of which the reference had e and e^2 times the probability."""
    tokens = TokenScores(torch.tensor([0.6, 0.1, 0.5]).log(), torch.tensor([0.3, 0.5, 0.4]).log())
    reference = torch.tensor([0.06, 0.5]).log() + torch.tensor([1.0, 2.0])
    empty = torch.empty(0)
    return ForgetBatch(tokens, torch.tensor([0, 0, 1]), 2, empty, empty, reference)


def computed(name: str, batch: ForgetBatch, **options: float) -> torch.Tensor:
    loss = FORGET_LOSSES[name]
    return loss.weight * loss.compute(batch, {**loss.options, **options})


def test_forget_losses_by_hand():
    batch = by_hand()
    torch.testing.assert_close(computed("ihl", batch), torch.tensor([1.3, 0.6, 1.1]))
    torch.testing.assert_close(computed("ga", batch), batch.scores.log_prob)
    npo = [-2 / 0.1 * log(1 / (1 + exp(-0.1 * lead))) for lead in (1, 2)]
    torch.testing.assert_close(computed("npo", batch), torch.tensor(npo))
    means = (log(0.06) / 2, log(0.5))
    simnpo = [0.125 * -2 / 4.5 * log(1 / (1 + exp(4.5 * mean))) for mean in means]
    torch.testing.assert_close(computed("simnpo", batch), torch.tensor(simnpo))
    with_margin = [0.125 * -2 / 3.5 * log(1 / (1 + exp(3.5 * (mean + 1)))) for mean in means]
    torch.testing.assert_close(computed("simnpo", batch, beta=3.5, delta=1.0), torch.tensor(with_margin))


def test_npo_begins_as_gradient_ascent_of_whole_rows():
    """Where p = p_ref its gradient is that of ln p (arXiv 2404.05868), and where a row has gone far it is 0."""
    log_prob, empty = torch.tensor([-3.0, -300.0], requires_grad=True), torch.empty(0)
    batch = ForgetBatch(
        TokenScores(log_prob, torch.zeros(2)), torch.arange(2), 2, empty, empty, torch.tensor([-3.0, -3.0])
    )
    computed("npo", batch).sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


OF_LOG_PROBABILITIES = [name for name, loss in FORGET_LOSSES.items() if not loss.needs & MADE]


@pytest.mark.parametrize("forget_loss", OF_LOG_PROBABILITIES)  # the others are in tests/test_field_losses.py
def test_the_loss_is_that_of_a_loop_over_all_logits(tokenizer, tmp_path, forget_loss):
    trainer = make_trainer(tokenizer, tmp_path, forget_loss)
    trainer.prepare()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)  # no longer the model that NPO refers to
    chosen, loss = [5, 0, 3, 2], FORGET_LOSSES[forget_loss]
    batch = trainer.data_collator([trainer.train_dataset[(i, 3 - k)] for k, i in enumerate(chosen)])
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens, rows, kept, at = [], [], [], []
    for row in range(8):
        for t in range(1, batch["labels"].shape[1]):
            label = batch["labels"][row, t]
            if label != -100:
                p = logits[row, t - 1].softmax(dim=-1)
                if row >= 4:
                    kept.append(-p[label].log())
                    continue
                tokens.append((p[label].log(), torch.cat([p[:label], p[label + 1 :]]).max().log()))
                rows.append(row)
                at.append(logits[row, t - 1])
    scores = TokenScores(*(torch.stack(part) for part in zip(*tokens, strict=True)))
    measured = [
        trainer.measured.targets[chosen] if len(trainer.measured.targets) else torch.empty(0),
        torch.cat([trainer.measured.profiles[i] for i in chosen]) if trainer.measured.profiles else torch.empty(0),
        trainer.measured.reference[chosen] if len(trainer.measured.reference) else torch.empty(0),
        torch.cat([trainer.measured.token_targets[i] for i in chosen])
        if trainer.measured.token_targets
        else torch.empty(0),
    ]
    given = ForgetBatch(scores, torch.tensor(rows), 4, *measured)
    if "rival_labels" in loss.needs:
        rivals, shares = trainer.measured.other_labels, trainer.measured.label_probabilities
        pairs = zip(at, torch.cat([rivals[i] for i in chosen]), strict=True)
        given = given._replace(
            label_probabilities=torch.cat([shares[i] for i in chosen]),
            log_rivals=torch.stack([one.log_softmax(dim=-1)[others.long()] for one, others in pairs]),
        )
    forget = loss.weight * loss.compute(given, loss.options).mean()
    _, count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert count["forget"] == (len(rows) if loss.over == "tokens" else 4)
    trainer.current_gradient_accumulation_steps = 1
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    torch.testing.assert_close(found, forget + torch.stack(kept).mean())


@pytest.mark.parametrize("forget_loss", ["npo", "level", "ihl", "soft_targets"])
def test_accumulated_batches_are_one_batch(tokenizer, tmp_path, forget_loss):
    def trained(**sizes) -> torch.Tensor:
        trainer = make_trainer(tokenizer, tmp_path, forget_loss, optim="sgd", max_steps=2, **sizes)
        trainer.train()
        return torch.cat([w.detach().flatten() for w in trainer.model.parameters() if w.requires_grad])

    whole = trained(per_device_train_batch_size=4)
    parts = trained(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_the_reference_of_npo_is_the_model_as_it_was_given(tokenizer, tmp_path):
    """Its adapter included: the rows' log-probabilities, in batches that do not divide them."""
    first = make_trainer(tokenizer, tmp_path, "npo", max_steps=3)
    first.train()
    base = first.measured.reference.clone()
    second = make_trainer(tokenizer, tmp_path, "npo", model=first.model, per_device_train_batch_size=3)
    second.prepare()
    expected = []
    for row in second.train_dataset.forget:
        with torch.no_grad():
            log_p = first.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
        expected.append(sum(log_p[t, label] for t, label in enumerate(row["labels"][1:]) if label != -100))
    torch.testing.assert_close(second.measured.reference, torch.stack(expected), atol=1e-4, rtol=1e-5)
    assert (second.measured.reference - base).abs().min() > 0.1


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("forget_loss", list(FORGET_LOSSES))
def test_every_loss_trains_an_adapter_and_all_weights(tokenizer, tmp_path, forget_loss, lora):
    trainer = make_trainer(tokenizer, tmp_path, forget_loss, lora=lora, forget_level=0.001)
    learning = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    assert all(".lora_" in name for name in learning) == lora
    trainer.train()
    moved = [name for name, w in trainer.model.named_parameters() if w.requires_grad and not w.equal(learning[name])]
    assert len(moved) == len(learning)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all({"loss/forget", "loss/retain", "probability/forget"} <= log.keys() for log in logs)


def test_a_loss_with_targets_ends_the_training_there(tokenizer, tmp_path):
    """The rows of a random model begin below any level, so that there is nothing to do."""
    trainer = make_trainer(tokenizer, tmp_path, "level", stopping_tolerance=5.0, num_train_epochs=9)
    trainer.train()
    assert trainer.reached and trainer.state.epoch == 1.0


def test_kl_is_from_the_model_without_its_adapter(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, "ga", retain_loss="kl")
    learns = {name: w.requires_grad for name, w in trainer.model.named_parameters()}
    trainer.train()
    first, *_, last = [log["loss/retain"] for log in trainer.state.log_history if "loss/retain" in log]
    assert first == pytest.approx(0.0, abs=1e-6) and last > 1e-6  # a fresh adapter is the base
    assert learns == {name: w.requires_grad for name, w in trainer.model.named_parameters()}


def test_kl_of_all_weights_is_from_the_model_as_it_was_given(tokenizer, tmp_path):
    """A frozen copy, which is neither trained nor saved."""
    given = make_llama(len(tokenizer))
    trainer = make_trainer(tokenizer, tmp_path, "ga", lora=False, model=given, retain_loss="kl")
    trainer.train()
    first, *_, last = [log["loss/retain"] for log in trainer.state.log_history if "loss/retain" in log]
    assert first == pytest.approx(0.0, abs=1e-6) and last > 1e-6
    (frozen,) = trainer._base._frozen
    before = dict(make_llama(len(tokenizer)).named_parameters())
    assert all(weight.equal(before[name]) for name, weight in frozen.model.named_parameters())
    assert not any(weight.requires_grad for weight in frozen.model.parameters())


def test_kl_of_all_weights_needs_them_whole(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.unlearn.is_zero3_split", lambda model: True)
    with pytest.raises(ValueError, match="`retain_loss` is 'kl', but all weights are trained and ZeRO-3 has split"):
        make_trainer(tokenizer, tmp_path, lora=False, retain_loss="kl")
    with pytest.raises(ValueError, match=r"`forget_loss` is 'whp', which needs a whole model.*ZeRO-3"):
        make_trainer(tokenizer, tmp_path, "whp")


def test_a_plain_adapter_has_no_use_for_alters_trainer(tokenizer, tmp_path):
    from trainer_setup import make_trainer as make_alter_trainer

    model = make_trainer(tokenizer, tmp_path).model
    with pytest.raises(ValueError, match="The adapter config is a LoraConfig, but must be an AlterConfig"):
        make_alter_trainer(tmp_path, tokenizer, model=model)


def test_an_alter_adapter_needs_its_own_trainer(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"an ALTER adapter.*`AlterUnlearnTrainer`"):
        UnlearnTrainer(
            make_llama(len(tokenizer)), UnlearnConfig(output_dir=str(tmp_path), bf16=False, report_to="none"),
            train_dataset=forget_rows(), retain_dataset=retain_rows(), peft_config=AlterConfig(),
            processing_class=tokenizer,
        )  # fmt: skip


def test_an_option_that_a_loss_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"has 'gamma', but `forget_loss='npo'` takes \['beta'\]"):
        UnlearnConfig(output_dir=str(tmp_path), forget_loss="npo", forget_loss_kwargs={"gamma": 1.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1"])
def test_an_option_that_is_no_finite_number(tmp_path, value):
    with pytest.raises(ValueError, match=r"`forget_loss_kwargs\['margin'\]` is .*, but must be a finite number"):
        UnlearnConfig(output_dir=str(tmp_path), forget_loss="hinge", forget_loss_kwargs={"margin": value})


@pytest.mark.parametrize(
    ("forget_loss", "name", "value", "bound"),
    [
        ("npo", "beta", 0.0, ", above 0"),
        ("npo", "beta", -0.1, ", above 0"),
        ("simnpo", "beta", 0, ", above 0"),
        ("simnpo", "delta", float("nan"), r"\."),
        ("hinge", "margin", float("inf"), r"\."),
    ],
)
def test_an_option_out_of_its_bounds(tmp_path, forget_loss, name, value, bound):
    message = rf"`forget_loss_kwargs\['{name}'\]` is {value}, but must be a finite number{bound}"
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(output_dir=str(tmp_path), forget_loss=forget_loss, forget_loss_kwargs={name: value})


def test_every_default_lies_within_its_bounds(tmp_path):
    for forget_loss, entry in FORGET_LOSSES.items():
        assert entry.positive <= entry.options.keys()
        UnlearnConfig(output_dir=str(tmp_path), forget_loss=forget_loss, forget_loss_kwargs=dict(entry.options))


@pytest.mark.parametrize("forget_loss", list(FORGET_LOSSES))
def test_what_a_loss_does_not_need_is_empty(tokenizer, tmp_path, forget_loss):
    """Also with ALTER's trainer, whose phase I measures all rows whatever the loss."""
    from trainer_setup import make_trainer as make_alter_trainer

    trainer = make_alter_trainer(
        tmp_path, tokenizer, adapter={}, forget_loss=forget_loss, others={"calibration_dataset": UNSEEN},
        activation_depth=0.75,
    )  # fmt: skip
    trainer.prepare()
    batch = trainer.data_collator([trainer.train_dataset[(i, i)] for i in range(3)])
    masks, loss = trainer._masks(batch), FORGET_LOSSES[forget_loss]
    scores = TokenScores(*torch.zeros(2, int(masks.labelled.sum())))
    given = forget_batch(scores, batch, masks, loss, trainer.measured)
    assert given.num_rows == 3 and len(given.log_prob) == len(given.sizes) == 3
    labels = sum(need.endswith("_labels") for need in loss.needs) * len(given.rows)
    assert len(given.other_labels) == len(given.label_probabilities) == labels
    assert (given.alternates is None) == (alternates_of(loss) is None)
    sizes = {"targets": 3, "profiles": len(given.rows), "reference": 3}
    assert {name: len(getattr(given, name)) for name in sizes} == {
        name: size if name in loss.needs else 0 for name, size in sizes.items()
    }


def test_columns_that_nothing_reads_are_left_alone(tokenizer, tmp_path):
    retain = Dataset.from_list([{**row, "source": "a"} for row in retain_rows()])
    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)), UnlearnConfig(output_dir=str(tmp_path), bf16=False, report_to="none"),
        train_dataset=forget_rows(), retain_dataset=retain, processing_class=tokenizer,
    )  # fmt: skip
    assert len(trainer._retain) == len(retain) and "source" not in trainer._retain.column_names


def taught_weights(trainer_class, rows, tokenizer, folder, **options) -> torch.Tensor:
    torch.manual_seed(0)
    model = make_llama(len(tokenizer))
    args = SFTConfig(
        str(folder), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, max_steps=3,
        dataloader_pin_memory=False, learning_rate=1e-2, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        gradient_checkpointing=False, optim="sgd", **options,
    )  # fmt: skip
    trainer_class(model, args, train_dataset=rows, processing_class=tokenizer).train()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


TEXTS = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in retain_rows()]})


@pytest.mark.parametrize("rows", [retain_rows(), TEXTS], ids=["completions", "texts"])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 1e-4)])
def test_labelled_tokens_alone_are_taught_as_by_trl(tokenizer, tmp_path, rows, bf16, tolerance):
    found = [taught_weights(kind, rows, tokenizer, tmp_path, bf16=bf16) for kind in (SFTTrainer, LabelledTrainer)]
    begin = torch.cat([weight.detach().flatten() for weight in make_llama(len(tokenizer)).parameters()])
    assert (found[0] - begin).abs().max() > 10 * tolerance
    torch.testing.assert_close(*found, atol=tolerance, rtol=0)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"packing": True}])
def test_other_losses_and_packed_rows_are_taught_by_trl(tokenizer, tmp_path, options, monkeypatch):
    if "packing" in options:  # TRL warns of attention across packed rows
        monkeypatch.setattr("trl.trainer.sft_trainer.logger.warning", lambda *args, **kwargs: None)
    options |= {"bf16": False, "max_length": 32}
    found = [taught_weights(kind, TEXTS, tokenizer, tmp_path, **options) for kind in (SFTTrainer, LabelledTrainer)]
    assert torch.equal(*found)


def test_pairs_change_with_the_epoch_and_cover_the_forget_set(tokenizer, tmp_path, monkeypatch):
    trainer, seen = make_trainer(tokenizer, tmp_path, num_train_epochs=2), []
    trainer.prepare()
    original = trainer.data_collator.torch_call
    chats = {tuple(row["input_ids"]): i for i, row in enumerate(trainer.train_dataset.forget)}

    def record(examples):
        seen.append([chats[tuple(example["forget"]["input_ids"])] for example in examples])
        return original(examples)

    monkeypatch.setattr(trainer.data_collator, "torch_call", record)
    trainer.train()
    assert [sorted(seen[i] + seen[i + 1]) for i in (0, 2)] == [list(range(8))] * 2
    assert seen[:2] != seen[2:]


def test_questions_become_turns_of_a_chat(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.prepare()
    ids = trainer.train_dataset.retain[0]["input_ids"]
    assert tokenizer.decode(ids).startswith("<|user|>What is the sky?<|end|><|assistant|>")


def test_an_unknown_loss_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"`forget_loss` is 'rmv', but must be one of \['tokens', 'soft_targets', 'level', 'profile', 'hinge'",
    ):
        make_trainer(tokenizer, tmp_path, "rmv")


def test_the_hook_of_the_last_hidden_states_is_gone_after_an_error(llama):
    decoder = llama.model
    with pytest.raises(TypeError):
        last_hidden_states(SimpleNamespace(), decoder, torch.ones(1, 2), torch.ones(1, 2))
    assert not decoder._forward_hooks
