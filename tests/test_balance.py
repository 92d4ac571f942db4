# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from made_up_benchmark import key, make_benchmark, named, save, scores
from scipy.stats import hmean

from alter_peft.report.balance import Balance, closeness, is_kept
from alter_peft.report.reading import read_benchmark


OTHERS = {
    "paraphrased__probability": (0.6, 0.2),
    "forget__rouge": (0.9, 0.3),
    "forget__exact_memorization": (1.0, 0.5),
    "forget__extraction_strength": (0.8, 0.05),
    "retain__probability": (0.96, 0.95),
    "bystanders__probability": (0.9, 0.9),
}  # of the target and the oracles


@pytest.fixture
def folder(tmp_path):
    """The target and three oracles have every part, and so has a method half way between them."""
    made = make_benchmark(tmp_path / "out")
    save(made, "target", 0, scores=scores(0.95, 0.55, -0.3, **{name: of[0] for name, of in OTHERS.items()}))
    for seed, step in enumerate((-0.01, 0.0, 0.01)):
        others = {name: of[1] + step for name, of in OTHERS.items()}
        save(made, "oracle", seed, scores=scores(0.1 + step, 0.5 + step, step, **others))
    return made


def balance(folder):
    return Balance(read_benchmark(folder))


def half_way(**changes):
    found = {name: (of[0] + of[1]) / 2 for name, of in OTHERS.items()}
    values = {"forget__probability": 0.525, "utility__model_utility": 0.44, **found, **changes}
    return {key(name.replace("__", "/")): value for name, value in values.items()}


def test_closeness_by_hand():
    """1 at the oracle's .2, 0 at the target's .8 and at -.4, as far on the other side."""
    found = [closeness(value, 0.2, 0.8) for value in (0.2, 0.8, 0.5, 0.05, -0.4, 1.0, -5.0)]
    assert found == pytest.approx([1.0, 0.0, 0.5, 0.75, 0.0, 0.0, 0.0])


def test_forgetting_is_the_harmonic_mean_of_five(folder):
    measured = balance(folder)
    assert [str(one) for one in measured.parts] == [
        "forget/probability",
        "paraphrased/probability",
        "forget/rouge",
        "forget/exact_memorization",
        "forget/extraction_strength",
    ]
    assert measured.forgetting(half_way()) == pytest.approx(0.5)
    # exact memorisation .95, of .5 and 1: .1
    assert measured.forgetting(half_way(forget__exact_memorization=0.95)) == pytest.approx(hmean([0.5] * 4 + [0.1]))
    assert measured.forgetting(half_way(forget__rouge=0.9)) == 0  # one part as it was
    assert measured.forgetting(half_way(forget__probability=0.1)) == pytest.approx(hmean([1.0] + [0.5] * 4))
    values = half_way()
    del values[key("forget/rouge")]
    assert measured.forgetting(values) is None  # a mean over fewer parts would pass for the others'


def test_a_part_in_which_there_is_nothing_to_forget_is_left_out(folder):
    target = {name: of[0] for name, of in OTHERS.items()}
    save(folder, "target", 0, scores=scores(0.95, 0.55, -0.3, **{**target, "forget__rouge": 0.301}))
    assert key("forget/rouge") not in balance(folder).parts


def test_utility_is_the_targets_at_most(folder):
    measured = balance(folder)
    assert measured.utility(half_way()) == pytest.approx(0.8)  # .44 of .55
    assert measured.utility(half_way(utility__model_utility=0.6)) == 1.0
    assert measured.both(half_way()) == pytest.approx(hmean([0.5, 0.8]))


def test_without_model_utility_it_is_what_is_kept(folder):
    without = ["utility/model_utility"]
    for name, seed in (("target", 0), ("oracle", 0), ("oracle", 1), ("oracle", 2)):
        step = (seed - 1) / 100
        others = {one: of[0] if name == "target" else of[1] + step for one, of in OTHERS.items()}
        found = scores(0.95 if name == "target" else 0.1 + step, 0.5, step, **others)
        save(folder, name, seed, scores=found, without=without)
    measured = balance(folder)
    assert [str(one) for one in measured.kept] == ["retain/probability", "bystanders/probability"]
    values = half_way(retain__probability=0.99, bystanders__probability=0.45)
    assert measured.utility(values) == pytest.approx(hmean([1.0, 0.5]))


def test_passages_that_are_asked_for_by_questions(tmp_path):
    """As hazard has it: accuracies stand for other words, and beside the probabilities of what stays."""
    of = {
        "forget__probability": (0.9, 0.1), "forget_questions__acc": (0.75, 0.25), "retain__probability": (0.9, 0.9),
        "retain_questions__acc": (0.8, 0.8), "bystanders__probability": (0.8, 0.8), "arc_easy__acc": (0.5, 0.5),
    }  # fmt: skip
    save(tmp_path, "target", 0, scores=named(**{name: value for name, (value, _) in of.items()}))
    for seed, step in enumerate((-0.01, 0.0, 0.01)):
        save(tmp_path, "oracle", seed, scores=named(**{name: value + step for name, (_, value) in of.items()}))
    save(tmp_path, "mine", 0, scores=named(**{name: value for name, (_, value) in of.items()}))
    measured = balance(tmp_path)
    assert [str(one) for one in measured.parts] == ["forget/probability", "forget_questions/acc"]
    assert [str(one) for one in measured.kept] == ["retain/probability", "bystanders/probability"]
    values = measured.benchmark.methods[0].values[0]
    assert measured.forgetting(values) == pytest.approx(1.0) and measured.utility(values) == 1.0
    values = {**values, key("forget_questions/acc"): 0.5, key("retain_questions/acc"): 0.4}
    assert measured.forgetting(values) == pytest.approx(hmean([1.0, 0.5]))
    assert measured.utility(values) == pytest.approx(hmean([1.0, 0.5, 1.0]))


def test_what_is_kept_better_and_bystanders(folder):
    measured = balance(folder)
    values = half_way(retain__probability=0.98, bystanders__probability=0.81)
    assert measured.kept_better(values) == pytest.approx(0.02)
    assert measured.bystanders(values) == pytest.approx(0.9)
    assert measured.kept_better({}) is None and measured.bystanders({}) is None


def test_without_a_target_nothing_is_said(folder):
    (folder / "target-0" / "result.json").unlink()
    measured = balance(folder)
    assert measured.benchmark.target is None and measured.parts == {} and measured.kept == []
    assert measured.both(half_way()) is None


@pytest.mark.parametrize("name", ["retain/probability", "bystanders/probability", "bystanders, public/probability"])
def test_sets_that_are_kept(name):
    assert is_kept(key(name))
    assert not any(map(is_kept, map(key, ("forget/probability", "holdout/probability", "retain/rouge"))))
    assert not is_kept(key(f"relearning/{name}"))
