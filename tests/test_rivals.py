# SPDX-License-Identifier: Apache-2.0
"""The tokens that a label's probability goes to: by a model that knows less of the rows to forget."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from trainer_setup import make_trainer

from alter_peft.losses import score_tokens
from alter_peft.scoring import ScoredModel
from alter_peft.trainer.damping import damped
from alter_peft.trainer.measuring import TEMPERATURE, labelled_rows
from alter_peft.trainer.rivals import CHUNK, COUNT, rank, score_with_rivals


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


UNSEEN = Dataset.from_list([{"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."}] * 2)


def identity(rows):
    return rows


def test_rivals_by_hand():
    """Without the label, and at temperature 2: shares as the square roots of probabilities."""
    log_p = torch.tensor([[0.5, 0.32, 0.18], [0.08, 0.02, 0.9]]).log()
    scores, rivals = rank(log_p, identity, torch.tensor([0, 2]), 3, temperature=2.0)
    torch.testing.assert_close(scores.log_prob.exp(), torch.tensor([0.5, 0.9]))
    torch.testing.assert_close(scores.log_rival.exp(), torch.tensor([0.32, 0.08]))
    assert rivals.labels.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(rivals.shares, torch.tensor([[4 / 7, 3 / 7], [2 / 3, 1 / 3]]))


def test_a_label_known_by_heart_has_rivals_all_the_same():
    """Where p = 1 in float32."""
    _, rivals = rank(torch.tensor([[80.0, 1.0, 0.0]]), identity, torch.tensor([0]), 3)
    torch.testing.assert_close(rivals.shares, torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.e)]]))


def test_rivals_are_tokens_that_the_model_has():
    """A reference may have been padded to more."""
    logits = torch.tensor([[1.0, 2.0, 0.0, 9.0]])
    _, rivals = rank(logits, identity, torch.tensor([1]), 3)
    assert rivals.labels.tolist() == [[0, 2]]


def test_chunks_are_one_after_another():
    logits = torch.randn(CHUNK + 9, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CHUNK + 9) % 40
    scores, rivals = rank(logits, identity, labels, 40)
    assert rivals.labels.shape == rivals.shares.shape == (CHUNK + 9, COUNT)
    torch.testing.assert_close(torch.stack(scores), torch.stack(score_tokens(logits, identity, labels)))
    _, alone = rank(logits[-1:], identity, labels[-1:], 40)
    assert torch.equal(rivals.labels[-1:], alone.labels)
    assert not (rivals.labels == labels.unsqueeze(-1)).any()
    torch.testing.assert_close(rivals.shares.sum(dim=-1), torch.ones(CHUNK + 9))


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
    for place, row in enumerate(found.rivals):
        torch.testing.assert_close(trainer.measured.label_probabilities[place], row.shares, atol=1e-5, rtol=1e-4)
        assert torch.equal(trainer.measured.other_labels[place], row.labels)


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
