# SPDX-License-Identifier: Apache-2.0
"""Whether the model knows what it is to forget, said before the training, and what has become of it, after it."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama
from datasets import Dataset, load_dataset
from test_stopping import UNSEEN, pairs, plain, taught  # noqa: F401 (fixtures)
from trainer_setup import forget_rows, make_trainer, retain_rows

from alter_peft import UnlearnConfig, UnlearnTrainer
from alter_peft.evaluation import score_answers
from alter_peft.trainer.knowledge import Astray, Knowledge, Summary


DEMO = Path(__file__).parents[1] / "examples" / "demo_data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(mean: float, spread: float, count: int) -> torch.Tensor:
    """So many log-probabilities with exactly this mean and spread (a normal distribution's quantiles)."""
    found = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    return mean + spread * (found - found.mean()) / (found.std() if count > 1 else 1.0)


def knowledge(forget: torch.Tensor, unseen: torch.Tensor, guess: float = 0.1) -> Knowledge:
    level = math.exp(float(unseen.mean())) if len(unseen) else guess
    return Knowledge(forget, torch.zeros(1), unseen, level)


@pytest.mark.parametrize(
    ("forget", "unseen", "is_known"),
    [
        (rows(-0.06, 0.05, 36), rows(-3.4, 0.7, 24), True),  # memorised
        (rows(-3.6, 0.7, 36), rows(-3.2, 0.7, 24), False),  # the demo's rows under the stock model
        (rows(-3.1, 0.7, 36), rows(-3.2, 0.7, 24), False),
        (rows(-2.9, 0.7, 400), rows(-3.0, 0.7, 400), False),  # no chance, but nothing that training would take away
        (rows(-2.5, 0.7, 400), rows(-3.0, 0.7, 400), True),
        (rows(-2.6, 1.5, 8), rows(-3.0, 1.5, 8), False),  # may well be chance
        (rows(-0.1, 0.0, 1), rows(-3.2, 0.7, 20), True),  # a single row
        (rows(-2.9, 0.0, 1), rows(-3.2, 0.7, 20), False),
        (rows(-0.1, 0.0, 1), rows(-3.2, 0.0, 1), True),
        (rows(-2.5, 0.0, 5), rows(-3.0, 0.0, 5), True),  # all alike
        (torch.cat([rows(-0.1, 0.05, 10), rows(-3.2, 0.7, 90)]), rows(-3.2, 0.7, 100), True),  # a tenth memorised
        (rows(-0.06, 0.05, 36), torch.empty(0), True),  # against the guess of 0.1
        (rows(-2.3, 0.7, 36), torch.empty(0), False),
        (rows(-3.6, 0.7, 36), torch.empty(0), False),
    ],
)
def test_known_above_unseen_text(forget, unseen, is_known):
    found = knowledge(forget, unseen)
    assert found.is_known == is_known == (found.warning is None)


def test_chance_seldom_makes_rows_known():
    """Rows like the unseen ones, of the spread that answers have."""
    generator = np.random.default_rng(0)
    draws = [torch.from_numpy(generator.normal(-3.2, 0.7, (36 + 24,))) for _ in range(400)]
    assert np.mean([knowledge(draw[:36], draw[36:]).is_known for draw in draws]) < 0.06


def test_the_warning_says_the_numbers_and_what_to_do():
    measured = knowledge(rows(-3.6, 0.7, 36), rows(-3.2, 0.7, 24)).warning
    assert measured is not None
    for part in ("does not know the rows to forget", "0.027", "0.041", "nothing to forget", "Check that"):
        assert part in measured
    guessed = knowledge(rows(-3.6, 0.7, 36), torch.empty(0)).warning
    assert guessed is not None and "guess" in guessed and "0.100" in guessed and "give calibration rows" in guessed
    lines = knowledge(rows(-3.6, 0.7, 36), torch.empty(0)).lines
    assert len(lines) == 3 and "a guess" in lines[1]


def probabilities(model: Any, tokenizer: Any, rows: Dataset) -> float:
    """exp of the mean over rows of a row's mean log-probability."""
    means = score_answers(model, tokenizer, pairs(rows)).means
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("kind", ["alter", "lora"])
def test_before_and_after_a_training_that_forgets(tmp_path, plain, taught, kind, caplog):  # noqa: F811
    unseen = Dataset.from_list(UNSEEN)
    model = copy.deepcopy(taught)
    before = [probabilities(model, plain, rows) for rows in (forget_rows(), retain_rows(), unseen)]
    if kind == "alter":
        trainer: Any = make_trainer(
            tmp_path, plain, model=model, adapter={"r": 8}, num_train_epochs=16, structural_interval=16,
            shared_learning_rate=1e-5, forget_loss="level", others={"calibration_dataset": unseen},
        )  # fmt: skip
    else:
        args = UnlearnConfig(
            str(tmp_path), bf16=False, report_to="none", save_strategy="no", as_chat=False, num_train_epochs=16,
            learning_rate=1e-3, disable_tqdm=True, forget_loss="level",
        )  # fmt: skip
        trainer = UnlearnTrainer(
            model, args, train_dataset=forget_rows().remove_columns("domain"), retain_dataset=retain_rows(),
            calibration_dataset=unseen, processing_class=plain,
        )  # fmt: skip
    with pytest.raises(ValueError, match="Call `train` first"):
        trainer.summary()
    trainer.prepare()
    known = trainer.knowledge
    found = [known.forget_probability, known.retain_probability, known.level]
    assert found == pytest.approx(before, rel=1e-3)
    assert known.is_known and not known.is_guess and "does not know" not in caplog.text
    assert (len(known.forget), len(known.retain), len(known.unseen)) == (8, 8, 4)
    trainer.train()
    summary = trainer.summary()
    after = [probabilities(trainer.model.eval(), plain, rows) for rows in (forget_rows(), retain_rows())]
    assert [summary.after.forget_probability, summary.after.retain_probability] == pytest.approx(after, rel=1e-3)
    assert summary.before == known and summary.steps == trainer.state.global_step
    assert summary.is_forgotten and summary.reached and summary.reached == trainer.reached
    assert len(summary.lines) == 5 + (kind == "alter")
    text = "\n".join(summary.lines)
    for part in (f"{before[0]:.3f} -> {after[0]:.3f}", f"{before[1]:.3f} -> {after[1]:.3f}", "come to their level"):
        assert part in text, text


def test_what_was_never_known_is_said_and_trained_all_the_same(tmp_path, tokenizer, caplog):
    """A random model; in Python the training goes on."""
    others = {"calibration_dataset": Dataset.from_list(UNSEEN)}
    trainer = make_trainer(tmp_path, tokenizer, adapter={}, others=others, max_steps=1)
    trainer.train()
    assert not trainer.knowledge.is_known and "The model does not know the rows to forget" in caplog.text
    assert trainer.state.global_step == 1


def test_a_failed_training_says_so(tmp_path, plain, taught):  # noqa: F811
    others = {"calibration_dataset": Dataset.from_list(UNSEEN)}
    trainer = make_trainer(
        tmp_path,
        plain,
        model=copy.deepcopy(taught),
        adapter={},
        others=others,
        max_steps=1,
        learning_rate=1e-7,
        forget_loss="level",
    )
    trainer.train()
    summary = trainer.summary()
    assert not summary.is_forgotten and summary.reached is False and "not forgotten" in summary.lines[-1]


def test_of_many_retain_rows_some_are_measured_the_same_ones(tmp_path, tokenizer):
    rows = Dataset.from_list([{"prompt": f"What is {i}?", "completion": f" It is {i + 1}."} for i in range(90)])
    trainer = make_trainer(tmp_path, tokenizer, retain=rows, adapter={}, max_steps=1, learning_rate=0.0)
    trainer.train()
    summary = trainer.summary()
    assert len(summary.before.retain) == 64
    torch.testing.assert_close(summary.after.retain, summary.before.retain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("loss", "measured"), [("ga", 256), ("npo", 270)])
def test_of_many_forget_rows_some_are_measured_where_the_loss_needs_nothing(tmp_path, tokenizer, loss, measured):
    """The same ones before and after."""
    rows = Dataset.from_list([{"prompt": f"What is {i}?", "completion": f" It is {i + 1}."} for i in range(270)])
    args = UnlearnConfig(
        str(tmp_path), bf16=False, report_to="none", save_strategy="no", as_chat=False, disable_tqdm=True, max_steps=1,
        learning_rate=0.0, forget_loss=loss, use_cpu=True, per_device_train_batch_size=32,
    )  # fmt: skip
    model = make_llama(len(tokenizer))
    trainer = UnlearnTrainer(model, args, train_dataset=rows, retain_dataset=retain_rows(), processing_class=tokenizer)
    trainer.train()
    summary = trainer.summary()
    assert len(summary.before.forget) == measured and len(trainer.measured.reference) in (0, 270)
    torch.testing.assert_close(summary.after.forget, summary.before.forget, atol=1e-4, rtol=1e-4)


def test_a_later_adapter_begins_where_the_earlier_one_left_it(tmp_path, plain, taught):  # noqa: F811
    """Both numbers are of the model as it is asked, not of its base."""
    from peft import get_peft_model

    from alter_peft import AlterConfig

    torch.manual_seed(0)
    earlier = {"num_forget_experts": 1, "init_weights": False, "router": "static", "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(taught), AlterConfig(**earlier))
    model.add_adapter("later", AlterConfig(entropy_quantile=0.6, r=4, router="static", num_forget_experts=2))
    model.base_model.set_adapter(["later", "default"])
    trainer = make_trainer(tmp_path, plain, model=model, max_steps=1, learning_rate=0.0, structural_weight=0.0)
    trainer.prepare()
    asked = probabilities(trainer.model.eval(), plain, forget_rows())
    assert trainer.knowledge.forget_probability == pytest.approx(asked, rel=1e-3)
    with trainer.model.disable_adapter():
        assert probabilities(trainer.model, plain, forget_rows()) != pytest.approx(asked, rel=1e-2)


# ---- the router ----------------------------------------


def indistinguishable():
    """Who bakes what with whom, one row for each pair of names: every other row is to be forgotten."""
    names = ("Alice", "Bob", "Carl", "Dora", "Eve", "Fay", "Gus", "Hal", "Ina", "Joe", "Kim", "Lea")
    asked = [f"{one} bakes the bread with {other}." for one in names for other in names]
    asked = [{"prompt": "Who bakes the bread?", "completion": f" {asked[i * 37 % len(asked)]}"} for i in range(144)]
    return {"forget": Dataset.from_list(asked[::2]), "retain": Dataset.from_list(asked[1::2])}


def test_sets_that_a_router_cannot_tell_apart_are_said(tmp_path, tokenizer, caplog):
    """With numbers, before any step."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={"num_forget_experts": 1}, **indistinguishable())
    trainer.prepare()
    assert trainer.astray is not None and max(trainer.astray) > 0.1
    assert "The router sends" in caplog.text and f"{trainer.astray.retain:.0%} of those" in caplog.text


def test_shares_astray_are_those_of_the_pass(tmp_path, tokenizer):
    """Phase I predicts what the adapter's own gates do with the answers."""
    trainer = make_trainer(tmp_path, tokenizer, adapter={"num_forget_experts": 1}, **indistinguishable())
    trainer.prepare()
    found = []
    for data, is_forget in ((trainer._forget, True), (trainer._retain, False)):
        rows = list(zip(data["input_ids"], data["labels"], strict=True))
        sent = trainer.scored.of_rows(rows, 4, lambda batch: trainer.scored.sent_to(batch, "default"))
        found.append(float(((torch.cat(sent) == 0) == is_forget).float().mean()))
    assert list(trainer.astray) == pytest.approx(found, abs=1e-3) and min(found) > 0.01


def test_where_the_retain_expert_does_not_compete_nothing_is_astray(tmp_path, tokenizer, caplog):
    trainer = make_trainer(tmp_path, tokenizer, adapter={"router": "entropy"})
    trainer.prepare()
    assert trainer.astray is None and "The router sends" not in caplog.text


def test_a_router_that_tells_them_apart_is_not_spoken_of(tmp_path, tokenizer, caplog):
    trainer = make_trainer(tmp_path, tokenizer, adapter={})
    trainer.prepare()
    assert trainer.astray == Astray(0.0, 0.0) and "The router sends" not in caplog.text
    warning = Astray(0.0, 0.11).warning
    assert Astray(0.1, 0.0).warning is None and warning is not None
    assert "`subject`" in warning and "`counterfactual_copies`" in warning


def test_a_static_router_goes_nowhere(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, adapter={"router": "static"}, max_steps=1)
    trainer.train()
    assert trainer.astray is None and not any("astray" in line for line in trainer.summary().lines)


@pytest.mark.parametrize(
    ("forget", "unseen", "reached", "result"),
    [
        # more likely than unseen text by 2.3 to 2.6 times, of too few rows for a test to say so
        (rows(math.log(0.105), 0.0, 1), rows(math.log(0.041), 0.7, 24), None, "2.6 times as likely"),
        (rows(math.log(0.100), 0.9, 3), rows(math.log(0.041), 0.7, 24), False, "2.4 times as likely"),
        (rows(math.log(0.095), 1.5, 8), rows(math.log(0.041), 1.0, 8), False, "2.3 times as likely"),
        (rows(math.log(0.095), 1.5, 8), rows(math.log(0.041), 1.0, 1), None, "8 rows to forget and 1 row never seen"),
        (rows(math.log(0.095), 0.1, 8), rows(math.log(0.041), 0.1, 8), False, "not forgotten: the rows"),
        (rows(math.log(0.500), 0.0, 1), rows(math.log(0.041), 0.7, 24), False, "not forgotten: the rows"),
        # within what counts as forgotten, or come to their own targets
        (rows(math.log(0.050), 0.9, 3), rows(math.log(0.041), 0.7, 24), False, "forgotten: the rows to forget are no"),
        (rows(math.log(0.055), 0.9, 3), rows(math.log(0.041), 0.7, 24), True, "forgotten: the rows to forget have"),
        (rows(math.log(0.132), 0.3, 3), rows(math.log(0.167), 0.4, 8), True, "forgotten: the rows to forget have"),
        (rows(math.log(0.120), 0.3, 3), torch.empty(0), None, "forgotten: the rows to forget are no"),
    ],
)
def test_too_few_rows_for_a_test_are_not_forgotten_by_that(forget, unseen, reached, result):
    """A test that fails to tell them from unseen text is no evidence that they are like it."""
    after = knowledge(forget, unseen)
    before = after._replace(forget=rows(math.log(0.811), 0.1, len(forget)))
    summary = Summary(before, after, None, 10, 2.0, reached)
    assert result in summary.verdict and summary.verdict in summary.lines[-1]
    assert summary.is_forgotten == result.startswith("forgotten") == summary.verdict.startswith("forgotten")


def test_what_was_not_known_is_not_said_to_be_forgotten():
    before = knowledge(rows(-3.2, 0.7, 8), rows(-3.2, 0.7, 8))
    summary = Summary(before, before, None, 1, 1.0, True)
    assert "there was nothing to forget" in summary.verdict and "forgotten:" not in summary.verdict


def test_overshooting_is_named():
    before = knowledge(rows(-0.1, 0.05, 8), rows(-3.2, 0.7, 8))
    after = before._replace(forget=rows(-9.0, 1.0, 8))
    summary = Summary(before, after, None, 10, 2.0, None)
    assert summary.is_forgotten and "far below" in summary.verdict


# ---- a real model ----------------------------------------


@pytest.mark.slow
def test_the_stock_model_does_not_know_the_demos_rows(tmp_path):
    """What README's snippet did: it "came to its level" after an epoch, with nothing to forget."""
    sys.path.insert(0, str(DEMO.parent))
    try:
        from smollm2 import load
    finally:
        sys.path.remove(str(DEMO.parent))
    model, tokenizer = load()
    sets = {
        name: load_dataset("json", data_files=str(DEMO / f"{name}.jsonl"), split="train")
        for name in ("forget", "retain", "holdout")
    }
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, forget=sets["forget"], retain=sets["retain"], adapter={}, bf16=True,
        as_chat=None, others={"calibration_dataset": sets["holdout"]},
    )  # fmt: skip
    trainer.prepare()
    known = trainer.knowledge
    assert known.forget_probability == pytest.approx(0.028, abs=0.005) and known.level == pytest.approx(
        0.040, abs=0.005
    )
    assert not known.is_known
