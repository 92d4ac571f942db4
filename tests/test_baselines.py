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

from alter_peft.benchmark.baselines import FORGET_LOSSES, ForgetScores, LabelledTrainer, LoraUnlearnTrainer
from alter_peft.losses import TokenScores
from alter_peft.tuner.decoder import last_hidden_states


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_trainer(tokenizer, folder, forget_loss="ihl", retain=None, **options) -> LoraUnlearnTrainer:
    defaults = {
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LoraUnlearnTrainer(
        make_llama(len(tokenizer)),
        SFTConfig(output_dir=str(folder), **{**defaults, **options}),
        forget_loss=forget_loss,
        train_dataset=forget_rows(),
        retain_dataset=retain_rows() if retain is None else retain,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )


def test_a_head_that_is_not_known_is_refused(tokenizer, tmp_path, monkeypatch):
    def refuse(*args):
        raise ValueError("no such head")

    monkeypatch.setattr("alter_peft.evaluation.answers.check_head", refuse)
    with pytest.raises(ValueError, match="no such head"):
        make_trainer(tokenizer, tmp_path)


def by_hand() -> ForgetScores:
    """Two rows of two tokens and of one, of which the reference had e and e^2 times the probability."""
    tokens = TokenScores(torch.tensor([0.6, 0.1, 0.5]).log(), torch.tensor([0.3, 0.5, 0.4]).log())
    log_prob = torch.tensor([0.06, 0.5]).log()
    return ForgetScores(tokens, torch.tensor([0, 0, 1]), log_prob, log_prob + torch.tensor([1.0, 2.0]))


def test_forget_losses_by_hand():
    scores = by_hand()
    assert FORGET_LOSSES["ihl"](scores).item() == pytest.approx((1.3 + 0.6 + 1.1) / 3)
    assert FORGET_LOSSES["ga"](scores).item() == pytest.approx((log(0.6) + log(0.1) + log(0.5)) / 3)
    npo = [-2 / 0.1 * log(1 / (1 + exp(-0.1 * lead))) for lead in (1, 2)]
    assert FORGET_LOSSES["npo"](scores).item() == pytest.approx(sum(npo) / 2)
    simnpo = [-2 / 4.5 * log(1 / (1 + exp(4.5 * mean))) for mean in (log(0.06) / 2, log(0.5))]
    assert FORGET_LOSSES["simnpo"](scores).item() == pytest.approx(0.125 * sum(simnpo) / 2)


def test_npo_begins_as_gradient_ascent_of_whole_rows():
    """Where p = p_ref its gradient is that of ln p (arXiv 2404.05868), and where a row has gone far it is 0."""
    log_prob = torch.tensor([-3.0, -300.0], requires_grad=True)
    tokens = TokenScores(torch.zeros(2), torch.zeros(2))
    FORGET_LOSSES["npo"](ForgetScores(tokens, torch.arange(2), log_prob, torch.tensor([-3.0, -3.0]))).backward()
    assert log_prob.grad.tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("forget_loss", list(FORGET_LOSSES))
def test_the_loss_is_that_of_a_loop_over_all_logits(tokenizer, tmp_path, forget_loss):
    trainer = make_trainer(tokenizer, tmp_path, forget_loss)
    before = trainer.reference.clone()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)  # no longer the model that NPO refers to
    chosen = [5, 0, 3, 2]
    batch = trainer.data_collator([trainer.train_dataset[(i, 3 - k)] for k, i in enumerate(chosen)])
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens, rows, sums, kept = [], [], torch.zeros(4), []
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
                sums = sums + torch.eye(4)[row] * p[label].log()
    scores = TokenScores(*(torch.stack(part) for part in zip(*tokens, strict=True)))
    forget = FORGET_LOSSES[forget_loss](ForgetScores(scores, torch.tensor(rows), sums, before[chosen]))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), forget + torch.stack(kept).mean())


def test_the_reference_of_npo_is_the_model_as_it_was_given(tokenizer, tmp_path):
    """Its adapter included: the rows' log-probabilities, in batches that do not divide them."""
    first = make_trainer(tokenizer, tmp_path, "npo", max_steps=3)
    base = first.reference.clone()
    first.train()
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True, per_device_train_batch_size=3)
    second = LoraUnlearnTrainer(
        first.model, args, forget_loss="npo", train_dataset=forget_rows(), retain_dataset=retain_rows(),
        processing_class=tokenizer,
    )  # fmt: skip
    expected = []
    for row in second.train_dataset.forget:
        batch = second.data_collator.rows([row])
        with torch.no_grad():
            log_p = first.model(input_ids=batch["input_ids"]).logits[0].log_softmax(dim=-1)
        labels = batch["labels"][0, 1:]
        expected.append(sum(log_p[t, label] for t, label in enumerate(labels) if label != -100))
    torch.testing.assert_close(second.reference, torch.stack(expected), atol=1e-4, rtol=1e-5)
    assert (second.reference - base).abs().min() > 0.1
    assert first.reference.equal(base)


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
    ids = trainer.train_dataset.retain[0]["input_ids"]
    assert tokenizer.decode(ids).startswith("<|user|>What is the sky?<|end|><|assistant|>")


def test_columns_beside_the_rows_are_left_out(tokenizer, tmp_path):
    retain = Dataset.from_list([{**row, "source": "a"} for row in retain_rows()])
    assert "source" not in make_trainer(tokenizer, tmp_path, retain=retain).train_dataset.retain.column_names


def test_an_unknown_loss_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"`forget_loss` is 'rmu', but must be one of \['ihl', 'ga', 'npo', 'simnpo'\]"
    ):
        make_trainer(tokenizer, tmp_path, "rmu")


def test_the_hook_of_the_last_hidden_states_is_gone_after_an_error(llama):
    decoder = llama.model
    with pytest.raises(TypeError):
        last_hidden_states(SimpleNamespace(), decoder, torch.ones(1, 2), torch.ones(1, 2))
    assert not decoder._forward_hooks
