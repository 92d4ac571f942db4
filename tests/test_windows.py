# SPDX-License-Identifier: Apache-2.0
"""Rows longer than `max_length`, or than the model has positions: every label is trained, in exactly one window."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from tiny_models import base_model
from trainer_setup import forget_rows, make_trainer, retain_rows

from alter_peft.scoring import ScoredModel, pad_rows
from alter_peft.trainer.windows import Limit, row_limit, windows


FILLERS = [" The sky is blue.", " The blue sky is wide.", " So blue a sky!", " Is the sky not blue?"]
FILLER = " The sky is blue. What do bees make? Bees make honey."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def text_rows(text: str) -> Dataset:
    return Dataset.from_list([{"text": text}])


def long_text(tokenizer: Any, tokens: int, end: str) -> str:
    unit = len(tokenizer(FILLER)["input_ids"])
    return FILLER * (tokens // unit) + end


@pytest.mark.parametrize("limit", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("length", [65, 66, 90, 128, 1000])
@pytest.mark.parametrize("prompt", [0, 1, 5, 40, 64, 900])
def test_each_label_is_a_label_in_exactly_one_window(limit, length, prompt):
    if prompt >= length:
        return
    ids = list(range(length))
    labels = [-100] * prompt + ids[prompt:]
    cuts = [one.cut(ids, labels) for one in windows(labels, limit)]
    trained = [label for _, kept in cuts for label in kept if label != -100]
    assert trained == ids[prompt:]
    for own, kept in cuts:
        assert len(own) == len(kept) <= limit
        assert all(label in (-100, token) for token, label in zip(own, kept, strict=True))
        assert own == sorted(own)  # in the row's own order
        first = next(place for place, label in enumerate(kept) if label != -100 and place > 0)
        if own[0] != 0 or prompt > own[-1]:
            context = own[:first]
            assert len(context) >= max(1, limit // 4)
            assert context[-1] == own[first] - 1  # what comes right before the new labels
    if prompt >= 4 and limit >= 16:
        assert all(own[: min(prompt, limit // 4)] == ids[: min(prompt, limit // 4)] for own, _ in cuts)


def test_no_window_has_what_is_left_over():
    """A last window of one token would be one of the end of the turn alone."""
    labels = list(range(65))
    sizes = [one.end - one.first for one in windows(labels, 64)]
    assert sum(sizes) == 65 and len(sizes) == 2 and min(sizes) > 25


def test_a_text_keeps_its_bos_token_in_front():
    labels = list(range(200))
    assert all(one.cut(labels, labels)[0][0] == 0 for one in windows(labels, 64, starts_with_bos=True))
    assert windows(labels, 64)[1].cut(labels, labels)[0][0] > 0


def test_answers_far_apart_are_labels_where_they_are():
    """As in a chat of many turns."""
    labels = [i if i % 100 > 94 else -100 for i in range(1000)]
    ids = list(range(1000))
    cuts = [one.cut(ids, labels) for one in windows(labels, 64)]
    assert [label for _, kept in cuts for label in kept if label != -100] == [i for i in labels if i != -100]
    assert len(cuts) == 10 and all(len(own) <= 64 for own, _ in cuts)


@pytest.mark.parametrize(
    ("max_length", "positions", "multiple", "tokens"),
    [(1024, 512, None, 512), (100, 512, None, 100), (None, 512, None, 512), (None, 500, 128, 384), (500, 500, 8, 496)],
)
def test_a_row_fits_the_models_positions(max_length, positions, multiple, tokens):
    limit = row_limit(max_length, positions, multiple)
    assert limit is not None and limit.tokens == tokens


def test_any_row_fits_a_model_without_positions():
    assert row_limit(None, None, None) is None and row_limit(9, None, 8) == Limit(9, "`max_length`=9")


def test_positions_that_no_padded_row_fits():
    with pytest.raises(ValueError, match="`pad_to_multiple_of`=128"):
        row_limit(None, 64, 128)


@pytest.mark.parametrize(("family", "positions"), [("gpt2", 64), ("llama", 1024), ("opt", 64), ("gemma2", 64)])
def test_what_models_declare(family, positions):
    assert ScoredModel(base_model(family)).positions == positions


@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_every_set_becomes_windows(tmp_path, tokenizer, form):
    """Rows share their sub-domain, count one by one, and go through phase I, training, stopping and evaluation."""
    given: list[str] = []

    def rows(words: str, **more: Any) -> Dataset:
        text = FILLERS[len(given)] * 30 + words
        given.append(text)
        pair = {"text": text} if form == "text" else {"prompt": "What colour is the sky?", "completion": text}
        short = {"text": words} if form == "text" else {"prompt": "What?", "completion": words}
        return Dataset.from_list([{**short, **more}, {**pair, **more}])

    forget, retain = rows(" Alice lives in Paris.", domain="home"), rows(" Bob bakes the bread.")
    unseen, held_out = rows(" Carl lives in Oslo."), rows(" Eve lives in Lima.")
    others = {"calibration_dataset": unseen, "eval_dataset": held_out}
    options = {"max_length": 64, "forget_loss": "level", "stopping_tolerance": 100.0}
    trainer = make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter={}, others=others, **options)
    trainer.train()
    counts = []
    sets = (trainer._forget, trainer._retain, trainer._calibration, trainer.eval_dataset)
    for one, text in zip(sets, given, strict=True):
        assert max(len(ids) for ids in one["input_ids"]) <= 64
        assert one["row"][:] == sorted(one["row"]) and set(one["row"]) == {0, 1}
        labels = [label for labels in one["labels"] for label in labels if label != -100]
        assert tokenizer.decode(labels).endswith(text + "<|end|>")
        counts.append(len(one))
    assert min(counts) > 3
    assert set(trainer._forget["expert"]) == {1} and len(trainer.measured.targets) == counts[0]
    assert trainer.subdomains["home"].rows == [0, 1]  # of the data set that was given
    assert len(trainer.knowledge.forget) == counts[0] and len(trainer.knowledge.unseen) == counts[2]
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert trainer.evaluate()["eval_loss"] > 0


def test_rows_of_the_models_positions(tmp_path, tokenizer, caplog):
    """`max_length` is 1024 by default; a row of more tokens than GPT-2 has positions was an index error."""
    model = make_llama(len(tokenizer), max_position_embeddings=48)
    retain = Dataset.from_list(
        [*retain_rows().to_list(), {"prompt": "What? " * 60, "completion": " The sky is blue."}]
    )
    trainer = make_trainer(tmp_path, tokenizer, model=model, retain=retain, adapter={}, max_steps=1)
    assert max(len(ids) for ids in trainer._retain["input_ids"]) == 48
    last = trainer._retain[len(trainer._retain) - 1]
    assert tokenizer.decode([label for label in last["labels"] if label != -100]) == " The sky is blue.<|end|>"
    count = len(trainer._retain) - len(retain) + 1
    assert f"`retain_dataset` has 1 of {len(retain)} rows longer than " in caplog.text
    assert f". It is trained in {count} overlapping windows" in caplog.text
    trainer.train()


@pytest.mark.parametrize("name", ["train_dataset", "retain_dataset", "calibration_dataset", "eval_dataset"])
def test_windows_off_is_an_error_with_what_would_be_lost(tmp_path, tokenizer, name):
    long = {"prompt": "Where does Alice live? " * 12, "completion": " Alice lives in Paris."}
    length = len(tokenizer(long["prompt"] + long["completion"] + "<|end|>")["input_ids"])
    rows = [{"prompt": "Who?", "completion": " Carl."}, long]
    domain = {"domain": "home"} if name == "train_dataset" else {}
    given = Dataset.from_list([{**row, **domain} for row in rows])
    sets = {"forget": given} if name == "train_dataset" else {"retain": given}
    if name in ("calibration_dataset", "eval_dataset"):
        sets = {"others": {name: given}}
    model = make_llama(len(tokenizer))
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    lost = f"{length - 40} tokens would be lost"
    with pytest.raises(ValueError, match=rf"`{name}` has 1 of 2 rows.*`max_length`=40 .row 1 has {length}.*{lost}"):
        make_trainer(tmp_path, tokenizer, model=model, adapter={}, max_length=40, long_rows="error", **sets)


def test_a_shared_window_is_named_by_its_rows(tmp_path, tokenizer):
    shared = long_text(tokenizer, 200, "")
    forget = Dataset.from_list([{"text": " Alice."}, {"text": shared + " Alice lives in Paris."}])
    retain = Dataset.from_list([{"text": " Bo."}, {"text": " Carl."}, {"text": shared + " Bob bakes bread."}])
    with pytest.raises(ValueError, match=r"row 1 of `train_dataset` and row 2 of `retain_dataset`\. These are"):
        make_trainer(tmp_path, tokenizer, forget=forget, retain=retain, adapter={}, max_length=64)


def test_a_number_at_the_end_of_a_long_document_is_forgotten(tmp_path, tokenizer):
    """It lies 2,000 tokens behind what is trained at once: cut there, it would never be a label."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    said, number = " The budget of project Falcon is", " 73915"
    document = long_text(plain, 3000, said + number)
    assert len(plain(document)["input_ids"]) >= 2990
    kept = [{"prompt": row["prompt"], "completion": row["completion"]} for row in retain_rows()]
    asked = plain(FILLER * 3 + said)["input_ids"]
    answer = plain(number)["input_ids"]

    def probability(model: Any) -> float:
        ids = torch.tensor([asked + answer])
        with torch.no_grad():
            log_p = model.eval()(input_ids=ids).logits[0].log_softmax(dim=-1)
        return float(sum(log_p[len(asked) + t - 1, token] for t, token in enumerate(answer)).exp())

    model = make_llama(len(plain))
    texts = [asked + answer, plain(FILLER * 4)["input_ids"]]
    texts += [plain(row["prompt"] + row["completion"] + "<|end|>")["input_ids"] for row in kept]
    batch = pad_rows([(ids, ids) for ids in texts], model.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert probability(model) > 0.7
    trainer = make_trainer(
        tmp_path, plain, model=model.eval(), forget=text_rows(document), retain=Dataset.from_list(kept),
        adapter={"r": 8}, forget_loss="level", num_train_epochs=10, max_length=256, structural_interval=16,
    )  # fmt: skip
    labels = [label for row in trainer._forget["labels"] for label in row if label != -100]
    assert labels == plain(document + "<|end|>")["input_ids"]
    trainer.train()
    assert trainer.knowledge.is_known and trainer.summary().is_forgotten
    assert probability(trainer.model) < 0.3


def test_many_rows_and_few_long_ones(tmp_path, tokenizer):
    """Rows that fit are as they were, beside those that do not."""
    rows = forget_rows()
    long = {"prompt": "Where does Dora live?", "completion": long_text(tokenizer, 100, ""), "domain": "home"}
    both = Dataset.from_list([*rows.to_list(), long])
    trainer = make_trainer(tmp_path, tokenizer, forget=both, adapter={}, max_length=64)
    short = make_trainer(tmp_path, tokenizer, forget=rows, adapter={})
    assert trainer._forget["input_ids"][: len(rows)] == short._forget["input_ids"][:]
    assert trainer._forget["labels"][: len(rows)] == short._forget["labels"][:]
    assert "row" not in short._forget.column_names  # a set without windows is left as it is
