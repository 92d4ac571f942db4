# SPDX-License-Identifier: Apache-2.0
"""The study of what ALTER costs measures what it says, on a tiny model of random weights."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import pytest


MODULES = ("speed", "speed_arms", "speed_decoding", "speed_floor", "speed_growth", "speed_setting", "speed_training")
MODULES += ("speed_turns",)
IN_FRESH_PROCESSES = {"memory", "loading", "importing", "landing"}  # of which each imports all anew; landing teaches
STUDIES = Path(__file__).parents[1] / "examples" / "studies"


@pytest.fixture(autouse=True)
def studies(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def setting(tmp_path):
    from speed_setting import Setting

    return Setting("tiny", tmp_path, steps=1)


def measured(setting, name):
    """As speed.json has it: a positive number for each arm, and a ratio of arms that there are."""
    import speed

    found = speed.measure(setting, speed.MEASUREMENTS[name])
    assert all(one["median"] > 0 and one["n"] >= 1 for one in found["arms"].values())
    assert len(found["ratios"]) == sum("V = 49k" not in one.what for one in speed.MEASUREMENTS[name].ratios)
    json.dumps(found)
    return found


def test_all_trainings_see_the_same_rows_in_each_step(setting):
    from speed_arms import TRAININGS

    steps = {}
    for name, make in TRAININGS.items():
        trainer = make(setting, 12)  # 10 of them are an epoch of rows to forget
        loader = trainer.get_train_dataloader()
        seen = []
        while len(seen) < 12:
            for batch in loader:
                pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
                rows = [ids[mask.bool()].tolist() for ids, mask in pairs]
                seen.append((batch["input_ids"].shape, rows, [int((row != -100).sum()) for row in batch["labels"]]))
        steps[name] = seen[:12]
    first, *others = steps.values()
    assert {shape[0] for shape, _, _ in first} == {8} and all(one == first for one in others)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("step", "phase_one", "requests")]


@pytest.mark.parametrize("name", ["experts_step", "decoding", "experts", "prefill", *LONG])
def test_a_measurement_measures(name, setting):
    found = measured(setting, name)
    counts = {one["n"] for one in found["arms"].values()}
    assert len(counts) == 1  # in turn


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(IN_FRESH_PROCESSES))
def test_a_measurement_in_fresh_processes_measures(name, setting):
    measured(setting, name)


@pytest.mark.slow  # the rates of the machine
def test_the_floor_is_below_what_was_measured(setting, monkeypatch):
    from speed_floor import floors

    monkeypatch.setattr("speed_floor.ROUNDS", 1)
    notes = measured(setting, "floor")["notes"]
    operations = notes["operations"]["step"]
    assert 0 < operations["LoRA, upper layers"] < operations["LoRA, TRL"]
    assert operations["ALTER"] < operations["ALTER, retain rows too"]
    for arm in notes["operations"]["decoding"].values():
        weights = setting.base.lm_head.weight.numel()
        assert arm > 2 * weights  # the head at least
    assert all(by_bytes > 0 for _, by_bytes in floors(notes, "decoding").values())


def test_the_counter_sees_products_in_place_and_a_cpus_attention():
    import torch
    from speed_floor import counter

    a, b, q = torch.ones(3, 5), torch.ones(5, 7), torch.ones(2, 4, 6, 8, requires_grad=True)
    with counter() as counting:
        torch.zeros(3, 7).addmm_(a, b)
    assert counting.get_total_flops() == 2 * 3 * 5 * 7
    with counter() as counting:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counting.get_total_flops() == (2 + 5) * 2 * 2 * 4 * 6 * 6 * 8  # products of (6, 8) and (8, 6), for 8 heads


def test_trainings_in_turn_end_as_they_do_alone(setting):
    import torch
    from speed_arms import sft
    from speed_turns import Steps

    def weights(trainer):
        return [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]

    alone, *turns = (sft(setting, 3) for _ in range(3))
    alone.train()
    loops = [Steps(trainer) for trainer in turns]
    taken = [[seconds for (seconds,) in parts] for parts in zip(*loops, strict=True)]
    assert len(taken) == 1 + 3 and all(seconds > 0 for parts in taken for seconds in parts)
    for trainer in turns:
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(alone), strict=True))


def test_a_training_that_stands_still_can_be_ended_and_says_its_error(setting):
    from speed_turns import Steps

    class Trainer:
        def add_callback(self, callback):
            self.callback = callback

        def train(self):
            self.callback.on_train_begin()
            self.callback.on_step_end()
            raise ArithmeticError("no such step")

    loop = Steps(Trainer())
    assert len(next(loop)) == 1 and len(next(loop)) == 1
    with pytest.raises(ArithmeticError, match="no such step"):
        next(loop)
    ended = Steps(Trainer())
    next(ended)
    ended.close()
    assert not ended._thread.is_alive()


def test_arms_take_turns_and_the_first_rounds_are_not_counted():
    from speed_turns import Ratio, compared, in_turn, summarized

    order = []

    def arm(name, factor):
        for value in count(1):
            order.append(name)
            yield [float(factor * value)]

    found = in_turn({"a": arm("a", 1), "b": arm("b", 2)}, rounds=3, skip=2)
    assert order == ["a", "b"] * 5 and found == {"a": [3.0, 4.0, 5.0], "b": [6.0, 8.0, 10.0]}
    assert compared(Ratio("", "", "a", "b"), found) == {"median": 0.5, "mean": 0.5, "p10": 0.5, "p90": 0.5}
    assert summarized(found["a"]) == {"median": 4.0, "mean": 4.0, "p10": 3.2, "p90": 4.8, "n": 3}


def test_a_run_goes_on_where_it_stopped_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    import speed
    from speed_turns import Found, Measurement, Ratio

    calls = []

    def run(setting, name):
        calls.append(name)
        return Found({"a": [1.0, 1.0], "b": [2.0, 2.0]}, {})

    known = {
        name: Measurement(
            name, lambda setting, name=name: run(setting, name), (Ratio(f"{name}!", "b", "a", "b", 0.4),)
        )
        for name in ("one", "two")
    }
    monkeypatch.setattr(speed, "MEASUREMENTS", known)
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: None)
    arguments = [str(tmp_path), "--shapes", "tiny"]
    speed.main([*arguments, "--only", "one"])
    speed.main(arguments)
    speed.main(arguments)
    assert calls == ["one", "two"]
    speed.main([*arguments, "--again", "--only", "t*"])
    assert calls == ["one", "two", "two"]
    printed = capsys.readouterr().out
    assert "| one! | b | 0.50 | 0.50 | 0.50 to 0.50 | 0.40 (median) | no |" in printed
    assert json.loads((tmp_path / "speed.json").read_text())["tiny"]["two"]["arms"]["b"]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "stpe"], "--only 'stpe' names no measurement. Choose from: step"),
        (["--tofu", "nowhere"], "--tofu is 'nowhere', but there is no such folder"),
        (["--model", "nowhere"], "--model is 'nowhere', but there is no such folder"),
        (["--steps", "0"], "--steps is 0, but must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(arguments, message, tmp_path, capsys):
    import speed

    with pytest.raises(SystemExit, match="2"):
        speed.main([str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_growth_is_measured_point_by_point_and_drawn(setting, tmp_path, monkeypatch):
    import speed
    from speed_growth import GROWTH, POINTS, draw, invented
    from speed_turns import Found

    rows = invented(300)
    assert len(set(rows.forget)) == 300 and not set(rows.forget) & set(rows.retain)
    assert {name.partition("/")[0] for name in POINTS} == set(GROWTH)
    one = GROWTH["length"]._replace(run=lambda setting, at: Found({"LoRA (s)": [at], "peak (MB)": [at]}, {}))
    monkeypatch.setitem(GROWTH, "length", one)
    point = POINTS["length/128"]
    found = {
        f"length/{at}": speed.measure(setting, point._replace(run=lambda setting, at=at: one.run(setting, at)))
        for at in one.values
    }
    assert [path.name for path in draw(found, tmp_path)] == ["growth_length.png", "growth_length_mb.png"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["length/128", "rows/100", "experts/8", "vocabulary/32768"])
def test_a_point_of_growth_is_measured(name, setting):
    import speed
    from speed_growth import POINTS

    assert all(one["median"] > 0 for one in speed.measure(setting, POINTS[name])["arms"].values())


def test_rows_come_as_long_as_they_are_wanted(tmp_path):
    from speed_setting import Setting

    long = Setting("tiny", tmp_path, length=512)
    for question, answer in long.rows.forget[:3]:
        assert 400 < len(long.tokenizer(question + answer)["input_ids"]) < 560
    assert long.tokens(3, 50).shape == (3, 50)


def test_no_tofu_rows_of_the_pilots_calibration_are_taken(tofu):
    from speed_setting import tofu_rows

    rows = tofu_rows(tofu)
    holdout = {json.loads(line)["question"] for line in (tofu / "holdout01.jsonl").read_text().splitlines()}
    assert [len(part) for part in rows] == [140, 140, 20]
    assert not holdout & {question for part in rows for question, _ in part}
