# SPDX-License-Identifier: Apache-2.0
"""Where forgetting ends, on a tiny model that has learned eight rows to forget and eight to retain by heart."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from conftest import make_llama
from datasets import Dataset
from trainer_setup import forget_rows, make_trainer, retain_rows
from transformers import TrainerCallback

from alter_peft import AlterUnlearnConfig
from alter_peft.evaluation import Pair, encode_pair, score_answers
from alter_peft.trainer import UnlearnTrainer
from alter_peft.trainer.measuring import Means
from alter_peft.trainer.stopping import CUTS, LOOKS, halve_rates, scheduled, stalls


LEVEL = 0.1
EPOCHS = 8
HOMES = (("Bob", "Lima"), ("Dora", "Oslo"), ("Fay", "Paris"), ("Hal", "Kiev"))
UNSEEN = [{"prompt": f"Where does {who} live?", "completion": f" {who} lives in {where}."} for who, where in HOMES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def plain(tokenizer):
    """Without a chat template, so that the rows are measured as they are trained."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def pairs(rows: Dataset) -> list[Pair]:
    return [Pair(row["prompt"], row["completion"]) for row in rows]


@pytest.fixture(scope="module")
def taught(plain):
    """A model that knows the answers of all rows."""
    encoded = [encode_pair(plain, pair) for pair in pairs(forget_rows()) + pairs(retain_rows())]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in encoded])
    labels = torch.tensor([[-100] * start + row[start:] + [-100] * (width - len(row)) for row, start in encoded])
    model = make_llama(len(plain))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    for rows in (forget_rows(), retain_rows()):
        assert min(score_answers(model, plain, pairs(rows)).probability) > 0.9
    return model.eval()


class Course(TrainerCallback):
    """Mean answer probabilities of the forget and of the retain rows, after every epoch."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.forget: list[float] = []
        self.retain: list[float] = []

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.forget.append(score_answers(model, self.tokenizer, pairs(forget_rows())).mean)
        self.retain.append(score_answers(model, self.tokenizer, pairs(retain_rows())).mean)


@pytest.fixture
def unlearn(tmp_path, plain, taught):
    """Unlearns with the defaults, but for a rate and a number of epochs that suit so small a model."""

    def unlearn(epochs: int, calibration: Dataset | None = None, resume: str | None = None, **options):
        course = Course(plain)
        trainer = make_trainer(
            tmp_path, plain, model=copy.deepcopy(taught), adapter={"r": 8}, num_train_epochs=epochs,
            structural_interval=16, shared_learning_rate=1e-5,
            others={"callbacks": [course], "calibration_dataset": calibration}, **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer, course

    return unlearn


def assert_lands(course: Course, level: float) -> None:
    """From above on the level within EPOCHS, and at rest there for as many again, while what is retained stays."""
    assert len(course.forget) == 2 * EPOCHS and course.forget[0] > 0.5 > level
    assert min(course.forget) > level - 0.04  # the momentum that it arrives with is soon called back
    assert course.forget[EPOCHS - 1 :] == pytest.approx([level] * (EPOCHS + 1), abs=0.025)
    assert min(course.retain) > 0.97


def test_the_default_lands_on_its_level(unlearn):
    _, course = unlearn(2 * EPOCHS, forget_loss="level", forget_level=LEVEL, stopping_tolerance=None)
    assert_lands(course, LEVEL)


def test_the_default_ends_there(unlearn):
    """Whatever the number of epochs: once the rows have landed there is nothing left to do."""
    _, course = unlearn(10 * EPOCHS, forget_loss="level", forget_level=LEVEL)
    assert len(course.forget) < 2 * EPOCHS and course.forget[-1] == pytest.approx(LEVEL, abs=0.025)


def test_the_default_lands_on_the_level_of_calibration_rows(unlearn):
    """Answers that the model was never taught, to questions of the same form; `forget_level` is not looked at."""
    trainer, course = unlearn(
        2 * EPOCHS, Dataset.from_list(UNSEEN), forget_loss="level", forget_level=0.5, stopping_tolerance=None
    )
    assert 0.04 < trainer.forget_level < 0.2
    assert_lands(course, trainer.forget_level)


def test_the_papers_hinge_overshoots(unlearn):
    """On the same budget it drives the rows far below: it has no point of rest."""
    _, course = unlearn(EPOCHS, forget_loss="ihl")
    assert course.forget[0] > 0.5 and course.retain[-1] > 0.97
    assert course.forget[-1] < LEVEL / 4


def test_defaults_of_the_targets():
    defaults = (AlterUnlearnConfig.forget_loss, AlterUnlearnConfig.forget_level, AlterUnlearnConfig.stopping_tolerance)
    assert defaults == ("soft_targets", None, 0.25) and AlterUnlearnConfig(output_dir="").guessed_level == LEVEL


def test_a_run_that_has_landed_makes_no_step_when_it_is_resumed(unlearn):
    """Its last checkpoint was written before the epoch was measured."""
    options = {"forget_loss": "level", "forget_level": LEVEL, "save_strategy": "steps", "save_steps": 2}
    first, _ = unlearn(10 * EPOCHS, **options)
    steps = first.state.global_step
    assert steps < 20 * EPOCHS  # of 2 an epoch
    checkpoints = Path(first.args.checkpoint_dir)
    weights = {name: weight.clone() for name, weight in first.model.state_dict().items() if ".alter_" in name}
    again, _ = unlearn(10 * EPOCHS, resume=str(checkpoints / f"checkpoint-{steps}"), **options)
    assert again.state.global_step == steps and again.state.epoch == first.state.epoch
    found = again.model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    earlier, _ = unlearn(10 * EPOCHS, resume=str(checkpoints / "checkpoint-2"), **options)
    assert earlier.state.global_step == steps


@pytest.mark.parametrize(
    ("gaps", "times"),
    [([], 0), ([3, 2, 1], 0), ([1, 1], 0), ([1, 1, 1], 1), ([2, 2.5, 1.7, 1.7, 1.5], 0), ([1, 0.95, 0.91], 1),
     ([1, 0.95, 0.89], 0), ([1, *[2] * 5], 2), ([1, 2, 2, 0.5, 2, 2], 2)],
)  # fmt: skip
def test_a_stall_is_epochs_that_come_no_nearer_by_a_tenth(gaps, times):
    assert stalls([(8, gap) for gap in gaps], 2) == times


def test_one_epoch_may_be_a_stall():
    assert stalls([(8, gap) for gap in (2, 1, 0.95, 0.7, 0.8)], 1) == 2


def test_where_rates_are_halved_no_more_a_slow_descent_goes_on():
    """By a twentieth an epoch, which a stall was before; two that come no nearer are the last, also of many steps."""
    slowly = [0.95**epoch for epoch in range(2 * CUTS + 20)]
    assert stalls([(8, gap) for gap in slowly], 1) == CUTS
    assert stalls([(8, gap) for gap in (*slowly, slowly[-1])], 1) == CUTS
    assert stalls([(8, gap) for gap in (*slowly, *[slowly[-1]] * 2)], 1) == CUTS + 1


def test_some_rows_are_not_compared_with_others():
    """Once eight are near, more are measured, which may be farther: they come nearer in every epoch here."""
    looks = [(8, 0.9), (8, 0.6), (64, 1.0), (64, 0.85), (64, 0.75), (64, 0.65), (64, 0.55)]
    assert stalls(looks, 2) == 0 < stalls([(8, gap) for _, gap in looks], 2)


WAIT = 2  # epochs of a stall


def far(monkeypatch) -> list[float]:
    """Forget rows that come no nearer; each look at them."""
    gaps: list[float] = []
    monkeypatch.setattr("alter_peft.trainer.stopping.LEAST_STEPS", 2 * WAIT)  # of 2 an epoch
    monkeypatch.setattr(UnlearnTrainer, "_mean_gap", lambda self, rows: gaps.append(3.0) or gaps[-1])
    return gaps


def rates(trainer) -> list[float]:
    return [group["lr"] for group in trainer.optimizer.param_groups]


FAR = {"forget_loss": "level", "forget_level": LEVEL, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-4}
FAR |= {"stopping_tolerance": 1.0}


def test_rates_are_halved_where_the_rows_come_no_nearer_and_then_it_ends(unlearn, monkeypatch):
    """And as often if the run is resumed: within the epochs of a stall, at their end, and at its own."""
    gaps = far(monkeypatch)
    whole, _ = unlearn(10 * EPOCHS, **FAR)
    epochs = 1 + WAIT * (CUTS + 1)
    assert whole.state.epoch == epochs == len(gaps) and not whole.reached
    assert rates(whole) == pytest.approx([1e-5 / 2**CUTS, 1e-4 / 2**CUTS])
    assert whole.summary().stalled and "They came no nearer" in whole.summary().verdict
    weights = {name: weight.clone() for name, weight in whole.model.state_dict().items() if ".alter_" in name}
    checkpoints, steps = Path(whole.args.checkpoint_dir), whole.state.global_step
    for step in (2 * WAIT - 1, 2 * (1 + WAIT), 2 * (1 + WAIT) + 1, steps):  # of 2 an epoch
        rest, _ = unlearn(10 * EPOCHS, resume=str(checkpoints / f"checkpoint-{step}"), **FAR)
        assert rest.state.global_step == steps and rates(rest) == pytest.approx(rates(whole))
        found = rest.model.state_dict()
        assert all(torch.allclose(found[name], weight, atol=1e-7) for name, weight in weights.items())


def test_no_epoch_counts_twice_however_often_a_run_is_resumed(unlearn, monkeypatch):
    """Nor do those before it had a tolerance."""
    far(monkeypatch)
    first, _ = unlearn(2, **{**FAR, "stopping_tolerance": None})
    checkpoint = str(Path(first.args.checkpoint_dir) / "checkpoint-4")
    for _ in range(2 * WAIT):
        again, _ = unlearn(2, resume=checkpoint, **FAR)
        assert again.state.stateful_callbacks[LOOKS] == {"2": (8, 3.0)}
    assert rates(again) == rates(first) and not again.summary().stalled


def test_epochs_of_few_steps_are_waited_for(unlearn, monkeypatch):
    """A request of few rows has an epoch of one or two steps, which a step too far makes a stall of."""
    far(monkeypatch)
    monkeypatch.setattr("alter_peft.trainer.stopping.LEAST_STEPS", 20)  # ten epochs here
    trainer, _ = unlearn(10, **{**FAR, "save_strategy": "no"})
    assert rates(trainer) == pytest.approx([1e-5, 1e-4])
    trainer, _ = unlearn(11, **{**FAR, "save_strategy": "no"})
    assert rates(trainer) == pytest.approx([0.5e-5, 0.5e-4])


def test_where_rates_cannot_be_halved_it_does_not_end(unlearn, monkeypatch):
    far(monkeypatch)
    monkeypatch.setattr("alter_peft.trainer.stopping.scheduled", lambda scheduler: None)
    trainer, _ = unlearn(12, **{**FAR, "save_strategy": "no"})
    assert trainer.state.epoch == 12 and not trainer.summary().stalled
    assert rates(trainer) == pytest.approx([1e-5, 1e-4])


def test_the_schedule_is_found_in_its_wrapper():
    """DeepSpeed has one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    wrapped = AcceleratedScheduler(schedule, optimizer)
    assert scheduled(wrapped) is scheduled(schedule) is schedule
    halve_rates(schedule)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert scheduled(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)) is None


def distance_from(profiles: list[torch.Tensor], model, tokenizer) -> float:
    """Mean distance of the forget rows' sorted log-probabilities from these, in nats."""
    reached = score_answers(model, tokenizer, pairs(forget_rows())).log_probs
    gaps = [(row.sort().values - profile).abs() for row, profile in zip(reached, profiles, strict=True)]
    return float(torch.cat(gaps).mean())


def test_the_profile_is_reached_rank_by_rank(unlearn, plain):
    """The level of the same rows is reached by other tokens: its mean alone is."""
    options = {"calibration": Dataset.from_list(UNSEEN), "stopping_tolerance": None}
    trainer, course = unlearn(2 * EPOCHS, forget_loss="profile", **options)
    profiles = trainer.measured.profiles
    reached = distance_from(profiles, trainer.model, plain)
    by_level = distance_from(profiles, unlearn(2 * EPOCHS, forget_loss="level", **options)[0].model, plain)
    assert reached < 0.5 < by_level
    assert course.forget[-1] == pytest.approx(float(trainer.measured.targets.exp().mean()), abs=0.05)
    assert min(course.retain) > 0.97


def test_the_profile_ends_there(unlearn):
    trainer, course = unlearn(10 * EPOCHS, Dataset.from_list(UNSEEN), forget_loss="profile")
    assert trainer.reached and len(course.forget) < 2 * EPOCHS


def passed(trainer, monkeypatch) -> list[int]:
    """How many rows each pass of labels has, as they come."""
    counts, passing = [], trainer.scored.label_log_probabilities
    monkeypatch.setattr(
        trainer.scored,
        "label_log_probabilities",
        lambda rows, *args, **kwargs: counts.append(len(rows)) or passing(rows, *args, **kwargs),
    )
    return counts


@pytest.mark.parametrize(("best", "again"), [(False, []), (True, [8])], ids=["last", "best checkpoint"])
def test_the_summary_takes_what_the_last_look_has_seen(unlearn, monkeypatch, best, again):
    trainer, _ = unlearn(1, **{**FAR, "save_strategy": "no"})
    measuring, step = trainer._measuring, trainer.state.global_step
    assert len(measuring._seen.of_rows) == 8 and measuring._seen.step == step
    found = trainer.summary().after.forget
    counts = passed(trainer, monkeypatch)
    monkeypatch.setattr(trainer.args, "load_best_model_at_end", best)
    summary = trainer._summarize()
    assert counts == [*again, 8]  # those to retain
    assert torch.allclose(summary.after.forget, found)
    assert torch.allclose(found, measuring.means(trainer._forget, trainer.model_wrapped), atol=1e-5)


def test_forget_rows_that_no_look_has_seen_are_passed(unlearn, monkeypatch):
    monkeypatch.setattr("alter_peft.trainer.stopping.PROBED_ROWS", 3)
    trainer, _ = unlearn(1, **{**FAR, "save_strategy": "no", "per_device_eval_batch_size": 1})
    everything = trainer._measuring.means(trainer._forget, trainer.model_wrapped)
    assert torch.allclose(trainer.summary().after.forget, everything, atol=1e-5)
    counts = passed(trainer, monkeypatch)
    trainer._summarize()
    assert counts == [5, 8]


def test_another_training_looks_anew(unlearn, monkeypatch):
    """Its steps count from 0 again."""
    monkeypatch.setattr("alter_peft.trainer.stopping.PROBED_ROWS", 3)
    trainer, _ = unlearn(1, **{**FAR, "save_strategy": "no"})
    trainer._measuring._seen = Means(trainer.state.global_step, dict.fromkeys(range(8), 9.0))
    trainer.train()
    assert trainer.summary().after.forget.max() <= 0  # log-probabilities
