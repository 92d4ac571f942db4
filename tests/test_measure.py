# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from conftest import make_llama
from peft import get_peft_model

from alter_peft import AlterConfig
from alter_peft.evaluation import METRICS, Asked, Pair, generate_answers, measure, score_answers
from alter_peft.evaluation.measure import answer_together
from alter_peft.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    min_k,
    near_one,
    rouge_l,
    truth_ratio,
    truthfulness,
    unique_tokens,
)


PAIRS = [
    Pair(
        "Where does Alice live?", "Alice lives in Paris.", ("Bob lives in Paris.", "In the sky."), "In Paris, she is."
    ),
    Pair("Who bakes?", "Bob bakes the bread.", ("Alice bakes.", "The bees, every morning.", "Honey."), "It is Bob."),
    Pair("What is the budget?", "Seven million.", ("Eight million.",), "The budget is seven million."),
]
UNPHRASED = [pair._replace(rephrased=None) for pair in PAIRS]


@pytest.fixture
def ask(llama, tokenizer):
    """Ask the tiny model a set of questions."""

    def asked(pairs=PAIRS, is_forget=False, **options):
        return Asked(llama, tokenizer, "set", pairs, is_forget, **{"max_new_tokens": 6, **options})

    return asked


@pytest.fixture
def passes(monkeypatch):
    """The passes over a model that a set has made: what was called, and its batch size."""
    module, made = import_module("alter_peft.evaluation.measure"), []

    def recorded(name, function):
        def call(*args, **options):
            made.append((name, options.get("batch_size")))
            return function(*args, **options)

        return call

    for name in ("score_answers", "generate_answers"):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return made


def means(model, tokenizer, completions: list[list[str]]) -> list[list[float]]:
    """Mean log-probability of completions of each question, one at a time."""
    return [
        [
            float(score_answers(model, tokenizer, [Pair(pair.prompt, text)]).log_probs[0].mean())
            for text in texts
        ]
        for pair, texts in zip(PAIRS, completions, strict=True)
    ]  # fmt: skip


def test_every_metric_is_the_function_of_its_name(ask, llama, tokenizer):
    scores = score_answers(llama, tokenizer, PAIRS)
    texts = generate_answers(llama, tokenizer, PAIRS, max_new_tokens=6)
    false = means(llama, tokenizer, [list(pair.wrong) for pair in PAIRS])
    true, rephrased = ([row[0] for row in means(llama, tokenizer, rows)] for rows in (
        [[pair.completion] for pair in PAIRS], [[pair.rephrased] for pair in PAIRS]
    ))  # fmt: skip
    expected = {
        "probability": scores.probability,
        "normalized_probability": [
            math.exp(own) / (math.exp(own) + sum(math.exp(mean) for mean in others))
            for own, others in zip(true, false, strict=True)
        ],
        "rouge": rouge_l(texts, [pair.completion for pair in PAIRS]),
        "truth_ratio": truth_ratio(rephrased, false),
        "exact_memorization": exact_memorization(scores.greedy, scores.content),
        "extraction_strength": extraction_strength(scores.greedy, scores.content),
        "min_k": min_k(scores.log_probs, scores.content),
        "unique_tokens": unique_tokens(texts),
    }
    assert set(expected) == set(METRICS) - {"astray"}
    found = measure(ask(), list(expected))
    assert list(found) == [f"set/{name}" for name in expected]
    for name, rows in expected.items():
        assert found[f"set/{name}"].rows == pytest.approx(rows, rel=1e-4), name
        if name != "truth_ratio":
            assert found[f"set/{name}"].value == pytest.approx(sum(rows) / len(PAIRS), rel=1e-4), name


def test_the_truth_ratio_of_a_set_depends_on_its_side(ask):
    forget, other = (measure(ask(is_forget=side), ["truth_ratio"])["set/truth_ratio"] for side in (True, False))
    assert forget.rows == other.rows
    assert forget.value == near_one(forget.rows) and other.value == truthfulness(other.rows)
    assert forget.value != other.value


def test_the_truth_ratio_takes_the_answer_itself_where_no_set_has_other_words(ask, llama, tokenizer):
    true = [row[0] for row in means(llama, tokenizer, [[pair.completion] for pair in PAIRS])]
    false = means(llama, tokenizer, [list(pair.wrong) for pair in PAIRS])
    found = measure(ask(UNPHRASED), ["truth_ratio"])["set/truth_ratio"].rows
    assert found == pytest.approx(truth_ratio(true, false), rel=1e-4)
    assert found != pytest.approx(measure(ask(), ["truth_ratio"])["set/truth_ratio"].rows, rel=0.01)


def test_all_answers_follow_what_is_given(ask, llama, tokenizer):
    given = [pair._replace(given="I say: ") for pair in PAIRS]
    expected = [
        [
            float(score_answers(llama, tokenizer, [Pair(pair.prompt, text, given="I say: ")]).log_probs[0].mean())
            for text in (pair.rephrased, *pair.wrong)
        ]
        for pair in PAIRS
    ]
    asked = ask(given)
    assert asked.true_means == pytest.approx([row[0] for row in expected], rel=1e-4)
    for found, row in zip(asked.false_means, expected, strict=True):
        assert found == pytest.approx(row[1:], rel=1e-4)


def test_probabilities_that_all_round_to_zero_still_have_a_share(tokenizer):
    """What gradient ascent leaves: a model so sure of nonsense that every answer's probability is 0 in float32."""
    model = make_llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    found = measure(Asked(model, tokenizer, "set", PAIRS), ["probability", "normalized_probability", "truth_ratio"])
    assert found["set/probability"].rows == [0.0] * len(PAIRS)
    assert all(0 <= row <= 1 for row in found["set/normalized_probability"].rows)
    assert all(math.isfinite(row) for row in found["set/truth_ratio"].rows)


def test_a_model_is_asked_once(ask, passes):
    asked = ask()
    assert passes == []
    measure(asked, ["probability", "min_k", "exact_memorization"])
    assert passes == [("score_answers", None)]
    for _ in range(2):
        measure(asked, [name for name in METRICS if name != "astray"])
    assert sorted(name for name, _ in passes) == ["generate_answers", *["score_answers"] * 3]  # + rephrased, false


def test_answers_are_spread_over_the_set(ask):
    pairs = [Pair(f"What is {number}?", "Seven.") for number in range(10)]
    for answered, expected in ((None, range(10)), (20, range(10)), (5, (0, 2, 4, 6, 8)), (3, (0, 3, 6)), (1, (0,))):
        assert ask(pairs, answered=answered).asked == [pairs[row] for row in expected]
    found = measure(ask(pairs, answered=5), ["rouge", "probability"])
    assert len(found["set/rouge"].rows) == 5 and len(found["set/probability"].rows) == 10


def test_the_batch_size_reaches_every_pass(ask, passes):
    metrics = ["normalized_probability", "truth_ratio", "rouge"]
    own, default = measure(ask(batch_size=2), metrics), measure(ask(), metrics)
    assert [size for _, size in passes] == [2] * 4 + [None] * 4
    for name in own:
        assert own[name].rows == pytest.approx(default[name].rows, rel=1e-4)


def test_sets_may_be_answered_together(llama, tokenizer, passes):
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama, config).eval()

    def ask(pairs):
        return Asked(model, tokenizer, "set", pairs, answered=3, max_new_tokens=8)

    sets = [PAIRS, PAIRS[:1], [Pair(f"What is {number * '1'}?", "Seven.") for number in range(1, 6)]]
    own = [ask(pairs).texts for pairs in sets]
    assert len({text for texts in own for text in texts}) > 3
    passes.clear()
    together = [ask(pairs) for pairs in sets]
    answer_together(together, batch_size=2)
    assert [one.texts for one in together] == own
    assert [name for name, _ in passes] == ["generate_answers"]
    answer_together([], batch_size=2)
    with pytest.raises(ValueError, match=r"`max_new_tokens` is \[6, 8\]"):
        answer_together([ask(PAIRS), Asked(model, tokenizer, "set", PAIRS, max_new_tokens=6)], batch_size=2)


def test_astray_is_of_gated_adapters(tokenizer):
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    gated = get_peft_model(make_llama(len(tokenizer)), config).eval()
    for is_forget in (True, False):
        found = measure(Asked(gated, tokenizer, "set", PAIRS, is_forget), ["astray"])["set/astray"]
        assert found.rows == score_answers(gated, tokenizer, PAIRS).astray(is_forget)
    for model in (
        make_llama(len(tokenizer)),
        get_peft_model(make_llama(len(tokenizer)), AlterConfig(router="static")),
    ):
        with pytest.raises(ValueError, match="'astray' was asked of the set 'set', but the model has no adapter"):
            measure(Asked(model, tokenizer, "set", PAIRS), ["astray"])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_metric(ask):
    with pytest.raises(ValueError, match=r"`metrics` has \['bleu'\], but must be some of \['probability', "):
        measure(ask(), ["probability", "bleu"])


@pytest.mark.parametrize("metric", ["normalized_probability", "truth_ratio"])
def test_without_false_answers(ask, metric, passes):
    asked = ask([PAIRS[0], PAIRS[1]._replace(wrong=()), PAIRS[2]])
    with pytest.raises(ValueError, match="The set 'set' has no `wrong` answers in row 1"):
        measure(asked, ["probability", metric])
    assert passes == []  # before anything is computed
    with pytest.raises(ValueError, match="The set 'set' has no `wrong` answers in row 1"):
        _ = asked.false_means


def test_other_words_for_some_alone(ask, passes):
    asked = ask([*PAIRS[:2], UNPHRASED[2]])
    with pytest.raises(ValueError, match="The set 'set' has no `rephrased` answer in row 2"):
        measure(asked, ["truth_ratio"])
    assert passes == []
    with pytest.raises(ValueError, match="The set 'set' has no `rephrased` answer in row 2"):
        _ = asked.true_means


@pytest.mark.parametrize("name", ["answered", "max_new_tokens", "batch_size"])
def test_numbers_below_one(ask, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, but must be 1 or more"):
        ask(**{name: 0})


def test_nothing_to_ask(ask):
    with pytest.raises(ValueError, match="The set 'set': `pairs` is empty"):
        ask([])
