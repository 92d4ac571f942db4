# SPDX-License-Identifier: Apache-2.0
"""Without calibration rows general text shows where the rows to forget are to come to."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from datasets import Dataset, concatenate_datasets
from trainer_setup import forget_rows, make_trainer, retain_rows

from alter_peft.retain_rows import retain_auto
from alter_peft.trainer.measuring import labelled_rows
from alter_peft.trainer.token_targets import token_targets
from alter_peft.trainer.token_traits import read_traits


UNSEEN = [{"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."}]
TEXTS = Dataset.from_list([{"text": f"{row['prompt']}{row['completion']}"} for row in forget_rows()])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def trainer_with(tokenizer, folder, forget=None, calibration=None, **options):
    retain = None if forget is None else Dataset.from_list([{"text": row["completion"]} for row in retain_rows()])
    others = {"calibration_dataset": calibration}
    options = {"forget_loss": "tokens", "structural_weight": 0, **options}
    return make_trainer(folder, tokenizer, forget=forget, retain=retain, adapter={}, others=others, **options)


@pytest.mark.parametrize("forget", [None, TEXTS], ids=["pairs", "texts"])
def test_it_has_the_form_of_the_rows_to_forget(tokenizer, tmp_path, forget, caplog):
    trainer = trainer_with(tokenizer, tmp_path, forget)
    general = trainer._measuring.rows.general
    assert len(general) > 200
    text = tokenizer.decode(general[0][0])
    asked = sum(label == -100 for label in general[0][1])
    assert "ripe banana" in text and (asked > 3 if forget is None else asked == 0)
    assert "forget rows come to what general text shows, a guess" in caplog.text


def as_chats(rows):
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in rows]
    return Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in turns])


@pytest.mark.parametrize("answers_only", [None, False])
def test_it_is_labelled_as_chats_to_forget_are(tokenizer, tmp_path, answers_only):
    trainer = make_trainer(
        tmp_path, tokenizer, forget=as_chats(forget_rows()), retain=as_chats(retain_rows()), adapter={},
        forget_loss="tokens", structural_weight=0, as_chat=True, completion_only_loss=answers_only,
    )  # fmt: skip
    shares = [
        sum(label != -100 for _, labels in rows for label in labels) / sum(len(ids) for ids, _ in rows)
        for rows in (trainer._measuring.rows.general, labelled_rows(trainer._forget))
    ]
    assert (min(shares) > 0.9) if answers_only is False else (max(shares) < 0.8 and min(shares) > 0.2)


def test_rows_to_retain_that_are_general_text_are_not_counted(tokenizer, tmp_path, monkeypatch):
    """They would make the text that stands for unseen rows look easy to foresee, beside that to forget."""
    counted = []
    monkeypatch.setattr(
        "alter_peft.trainer.measuring.read_traits", lambda *args: counted.append(args[2]) or read_traits(*args)
    )
    retain = concatenate_datasets([retain_auto(forget_rows().remove_columns("domain")), retain_rows()])
    trainer = make_trainer(tmp_path, tokenizer, retain=retain, adapter={}, forget_loss="tokens", structural_weight=0)
    trainer.prepare()
    assert len(counted) == 1 and len(counted[0]) == len(retain_rows()) and len(trainer._measuring.rows.general) > 200


def test_the_rows_come_to_its_values(tokenizer, tmp_path):
    """Tokens as likely as those of text that no training has touched, and a level of the same kind."""
    trainer = trainer_with(tokenizer, tmp_path)
    trainer.prepare()
    measuring = trainer._measuring
    guide = measuring.guide(4, base=True)
    assert len(guide.general) == len(measuring.rows.general)
    assert len(guide.traits.unseen.is_end) == sum(len(row.log_prob) for row in guide.general)
    known = [row.log_prob for row in measuring.scores(measuring.rows.forget, 4, base=True)]
    found = token_targets(known, [], guide, 0.1)
    assert trainer.measured.level == pytest.approx(found.level, rel=1e-3) and trainer.knowledge.is_guess
    for one, other in zip(trainer.measured.token_targets, found.log_prob, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-3)
    values = torch.cat([row.log_prob for row in guide.general])[~torch.from_numpy(guide.traits.unseen.is_end)]
    for target, own in zip(trainer.measured.token_targets, known, strict=True):
        assert torch.allclose(target[-1:], own[-1:], atol=1e-3)  # what ends the answer
        lowered = target[:-1] < own[:-1] - 1e-2  # to values that general text has
        assert ((target[:-1][lowered] >= values.min() - 1e-3) & (target[:-1][lowered] <= values.max() + 1e-3)).all()
    assert trainer.measured.guide.endswith("and by the texts, values by general text")


@pytest.mark.parametrize(
    "options",
    [{"forget_level": 0.2}, {"forget_loss": "level"}, {"calibration": Dataset.from_list(UNSEEN)}],
    ids=["a level", "another loss", "calibration rows"],
)
def test_where_something_else_shows_the_level_it_is_not_read(tokenizer, tmp_path, options, caplog):
    trainer = trainer_with(tokenizer, tmp_path, **options)
    assert len(trainer._measuring.rows.general) == 0
    guessed = {0.2: "`forget_level`=0.2, a guess", None: "`forget_level`=0.1, a guess"}[options.get("forget_level")]
    assert (guessed in caplog.text) == ("calibration" not in options)


def test_text_that_does_not_fit_is_left_out(tokenizer, tmp_path, caplog):
    """It would be cut, and then end without what ends an answer."""
    whole = trainer_with(tokenizer, tmp_path / "whole")._measuring.rows.general
    sizes = sorted(len(ids) for ids, _ in whole)
    some = trainer_with(tokenizer, tmp_path / "some", max_length=sizes[len(sizes) // 2])._measuring.rows.general
    assert 0 < len(some) < len(whole) and all(row in whole for row in some)
    assert "what general text shows" in caplog.text
    none = trainer_with(tokenizer, tmp_path / "none", max_length=sizes[0])._measuring.rows.general
    assert len(none) == 0 and "`forget_level`=0.1, a guess" in caplog.text


def test_rows_of_tokens_have_none(tokenizer, tmp_path):
    """Nothing says which form general text would have to have beside them: the level is a guess, as before."""
    rows, kept = (
        [{"input_ids": tokenizer(f"{row['prompt']}{row['completion']}")["input_ids"]} for row in given]
        for given in (forget_rows(), retain_rows())
    )
    rows = [{**row, "domain": given["domain"]} for row, given in zip(rows, forget_rows(), strict=True)]
    trainer = make_trainer(
        tmp_path, tokenizer, model=make_llama(len(tokenizer)), forget=Dataset.from_list(rows),
        retain=Dataset.from_list(kept), adapter={}, forget_loss="tokens", structural_weight=0,
    )  # fmt: skip
    trainer.prepare()
    assert len(trainer._measuring.rows.general) == 0 and trainer.measured.level == 0.1
    assert trainer.measured.guide.endswith("values by `forget_level`")
