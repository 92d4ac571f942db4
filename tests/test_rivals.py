# SPDX-License-Identifier: Apache-2.0
"""The tokens that a label's probability goes to: by a model that knows less of the rows to forget."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_llama
from datasets import Dataset
from trainer_setup import make_trainer

from alter_peft.losses import FORGET_LOSSES, score_tokens
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.damping import TEMPERATURE, damped
from alter_peft.trainer.measuring import labelled_rows
from alter_peft.trainer.rivals import CHUNK, COUNT, FIRST, Rivals, score_with_rivals, scores_and_rivals


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


UNSEEN = Dataset.from_list([{"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."}] * 2)


def identity(rows):
    return rows


def test_rivals_by_hand():
    """Without the label, and at temperature 2: shares as the square roots of probabilities."""
    log_p = torch.tensor([[0.5, 0.32, 0.18], [0.08, 0.02, 0.9]]).log()
    scores, rivals = scores_and_rivals(log_p, identity, torch.tensor([0, 2]), 3, temperature=2.0)
    torch.testing.assert_close(scores.log_prob.exp(), torch.tensor([0.5, 0.9]))
    torch.testing.assert_close(scores.log_rival.exp(), torch.tensor([0.32, 0.08]))
    assert rivals.labels.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(rivals.shares, torch.tensor([[4 / 7, 3 / 7], [2 / 3, 1 / 3]]))


def test_a_label_known_by_heart_has_rivals_all_the_same():
    """Where p = 1 in float32."""
    _, rivals = scores_and_rivals(torch.tensor([[80.0, 1.0, 0.0]]), identity, torch.tensor([0]), 3)
    torch.testing.assert_close(rivals.shares, torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.e)]]))


def test_rivals_are_tokens_that_the_model_has():
    """A reference may have been padded to more."""
    logits = torch.tensor([[1.0, 2.0, 0.0, 9.0]])
    _, rivals = scores_and_rivals(logits, identity, torch.tensor([1]), 3)
    assert rivals.labels.tolist() == [[0, 2]]


def test_chunks_are_one_after_another():
    logits = torch.randn(CHUNK + 9, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CHUNK + 9) % 40
    scores, rivals = scores_and_rivals(logits, identity, labels, 40)
    assert rivals.labels.shape == rivals.shares.shape == (CHUNK + 9, COUNT)
    torch.testing.assert_close(torch.stack(scores), torch.stack(score_tokens(logits, identity, labels)))
    _, alone = scores_and_rivals(logits[-1:], identity, labels[-1:], 40)
    assert torch.equal(rivals.labels[-1:], alone.labels)
    assert not (rivals.labels == labels.unsqueeze(-1)).any()
    torch.testing.assert_close(rivals.shares.sum(dim=-1), torch.ones(CHUNK + 9))


def test_the_first_rival_leads_as_the_label_is_to_be_behind():
    """By e times the label's .2, which is .2 e / .8 of what it gives up; the others as they shared the rest."""
    rivals = Rivals(torch.tensor([[3, 4, 5]] * 4), torch.tensor([[0.5, 0.3, 0.2]] * 4))
    found = rivals.led(torch.tensor([0.2, 0.01, 0.2, 0.2]).log(), torch.tensor([-1.0, -1.0, 0.5, -9.0]))
    first = 0.2 * math.e / 0.8
    torch.testing.assert_close(found.shares[0], torch.tensor([first, (1 - first) * 0.6, (1 - first) * 0.4]))
    assert torch.equal(found.shares[1:3], rivals.shares[1:3])  # it leads by more already; the label is to be first
    # by two nats at most, for which there is no room here
    torch.testing.assert_close(found.shares[3], torch.tensor([FIRST, 0.006, 0.004]))
    assert torch.equal(found.labels, rivals.labels)
    torch.testing.assert_close(found.shares.sum(dim=-1), torch.ones(4))


def test_a_loss_without_rivals_looks_for_none(tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path, tokenizer, adapter={}, forget_loss="tokens", others={"calibration_dataset": UNSEEN}
    )
    trainer.prepare()
    assert not trainer.measured.other_labels and not trainer._measuring.guide(4).rivals


def test_rivals_without_targets_are_refused():
    with pytest.raises(ValueError, match="'rival_labels' without 'token_targets'"):
        dataclasses.replace(FORGET_LOSSES["soft_targets"], needs=frozenset({"rival_labels"}))


@pytest.mark.parametrize("is_reference", [False, True], ids=["damped", "reference"])
def test_the_trainers_are_those_of_a_pass(tokenizer, tmp_path, is_reference):
    """Of the model with damped layers, its shares flattened; of a reference its own."""
    other = make_llama(len(tokenizer), seed=1) if is_reference else None
    others = {"calibration_dataset": UNSEEN, "reference_model": other}
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, forget_loss="soft_targets", others=others)
    trainer.prepare()
    scored, rows = ScoredModel(other or make_llama(len(tokenizer))), labelled_rows(trainer._forget)
    if is_reference:
        found = score_with_rivals(scored, rows, 1, len(tokenizer))
    else:
        with damped([*scored.stack.layers]):
            found = score_with_rivals(scored, rows, 1, len(tokenizer), TEMPERATURE)
    aims = zip(trainer.measured.token_targets, trainer.measured.token_leads, strict=True)
    for place, (row, aim) in enumerate(zip(found.rivals, aims, strict=True)):
        row = row.led(*aim)
        torch.testing.assert_close(trainer.measured.label_probabilities[place], row.shares, atol=1e-5, rtol=1e-4)
        assert torch.equal(trainer.measured.other_labels[place], row.labels)


def test_a_step_without_retain_rows_is_that_of_a_loop(tokenizer, tmp_path):
    """Rows in another order than they were measured in, each with its own rivals and shares."""
    trainer = make_trainer(
        tmp_path, tokenizer, adapter={}, forget_loss="soft_targets", others={"calibration_dataset": UNSEEN},
        retain_weight=0.0,
    )  # fmt: skip
    trainer.prepare()
    chosen, model, measured = [5, 0, 3, 2], make_llama(len(tokenizer)), trainer.measured
    batch = trainer.data_collator([trainer.train_dataset[(i, 0)] for i in chosen])
    losses = []
    for i in chosen:
        ids, labels = torch.tensor([trainer._forget[i]["input_ids"]]), torch.tensor(trainer._forget[i]["labels"][1:])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1][labels != -100].log_softmax(dim=-1)
        for t, label in enumerate(labels[labels != -100]):
            q, lead = measured.token_targets[i][t].exp(), measured.token_leads[i][t]
            p, rival = log_p[t, label], max(log_p[t, :label].max(), log_p[t, label + 1 :].max())
            aim = min(q.logit(), torch.tensor(0.9).logit())
            reached = min(p.exp().logit(), aim) if aim == torch.tensor(0.9).logit() else p.exp().logit()
            parts = [F.smooth_l1_loss(reached, aim, beta=0.5)]
            if lead < 0:
                too_far = (p - rival - lead.clamp(min=-2)).clamp(min=0)
                parts.append(F.smooth_l1_loss(too_far, torch.tensor(0.0), beta=0.5))
            softly = q * (q.log() - p)
            for rival, share in zip(measured.other_labels[i][t], measured.label_probabilities[i][t], strict=True):
                wanted = (1 - q) * share
                softly += wanted * (wanted.log() - log_p[t, rival]) if share > 0 else 0
            losses.append(sum(parts) + trainer.args.loss_options["rival_weight"] * softly)
    found = trainer._terms(trainer.model, batch, trainer._masks(batch), {"forget": len(losses), "retain": 1})
    torch.testing.assert_close(found["forget"], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def mass_on_rivals(trainer, reference) -> float:
    """What the rivals by the reference have together, the mean over the rows' labels."""
    scored, rows = trainer.scored, labelled_rows(trainer._forget)
    wanted = score_with_rivals(ScoredModel(reference), rows, 4, scored.head.vocab_size).rivals
    found = scored.of_rows(rows, 4, lambda batch: scored.head(batch.hidden).softmax(dim=-1), by_length=False)
    pairs = zip(found, wanted, strict=True)
    return float(torch.cat([p.gather(-1, row.labels.long()).sum(dim=-1) for p, row in pairs]).mean())


def test_what_labels_give_up_goes_to_their_rivals(tokenizer, tmp_path):
    """More of it than where nothing says where to."""
    found = {}
    for loss in ("tokens", "soft_targets"):
        reference = make_llama(len(tokenizer), seed=1)
        others = {"calibration_dataset": UNSEEN, "reference_model": reference}
        options = {"optim": "adamw_torch", "learning_rate": 1e-2, "num_train_epochs": 30, "stopping_tolerance": None}
        trainer = make_trainer(
            tmp_path / loss, tokenizer, adapter={}, forget_loss=loss, others=others, structural_weight=0, **options
        )
        trainer.train()
        found[loss] = mass_on_rivals(trainer, reference)
    assert found["soft_targets"] > found["tokens"] + 0.1
