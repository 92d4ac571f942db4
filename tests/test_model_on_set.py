# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import zlib
from importlib import import_module

import pytest
import torch
from conftest import make_llama
from peft import get_peft_model

from alter_peft import AlterConfig
from alter_peft.evaluation import METRICS, Key, ModelOnSet, Pair, Score, generate_answers, measure, score_answers
from alter_peft.evaluation.metrics import is_guard, is_ingredient
from alter_peft.evaluation.metrics.membership import min_k, min_k_plus_plus
from alter_peft.evaluation.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    floored_extraction_strength,
)
from alter_peft.evaluation.metrics.text import bleu, rouge_f, rouge_l, unique_tokens
from alter_peft.evaluation.metrics.truth_ratio import truth_ratio, truth_share
from alter_peft.evaluation.model_on_set import answer_together
from alter_peft.evaluation.scores import AVERAGES, Scores
from alter_peft.evaluation.z_scores import token_z_scores


PAIRS = [
    Pair(
        "Where does Alice live?", "Alice lives in Paris.", ("Bob lives in Paris.", "In the sky."), "In Paris, she is."
    ),
    Pair("Who bakes?", "Bob bakes the bread.", ("Alice bakes.", "The bees, every morning.", "Honey."), "It is Bob."),
    Pair("What is the budget?", "Seven million.", ("Eight million.",), "The budget is seven million."),
]
ALL = [name for name in METRICS if name not in ("fluency", "high_entropy", "expert_usage", "astray")]
UNPHRASED = [pair._replace(rephrased=None) for pair in PAIRS]


@pytest.fixture
def ask(llama, tokenizer):
    """Ask the tiny model a set of questions."""

    def asked(pairs=PAIRS, is_forget=False, **options):
        return ModelOnSet(llama, tokenizer, "set", pairs, is_forget, **{"max_new_tokens": 6, **options})

    return asked


def rows_of(asked: ModelOnSet, metric: str) -> Score:
    """The one score of a metric."""
    (score,) = measure(asked, [metric])
    return score


@pytest.fixture
def passes(monkeypatch):
    """The passes over a model that a set has made: what was called, and its batch size."""
    module, made = import_module("alter_peft.evaluation.model_on_set"), []

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
        "choice_accuracy": [float(own > max(others)) for own, others in zip(rephrased, false, strict=True)],
        "rouge": rouge_l(texts, [pair.completion for pair in PAIRS]),
        "truth_ratio": truth_ratio(rephrased, false),
        "exact_memorization": exact_memorization(scores.greedy, scores.content),
        "extraction_strength": extraction_strength(scores.greedy, scores.content),
        "min_k": min_k(scores.log_probs, scores.content),
        "rouge_f": rouge_f(texts, [pair.completion for pair in PAIRS]),
        "bleu": bleu(texts, [pair.completion for pair in PAIRS]),
        "verbmem": rouge_f(texts, [pair.completion for pair in PAIRS]),
        "knowmem": rouge_f(texts, [pair.completion for pair in PAIRS]),
        "unique_tokens": unique_tokens(texts),
        "rephrased_probability": [math.exp(mean) for mean in rephrased],
        "truth_share": truth_share(rephrased, false),
        "floored_extraction_strength": floored_extraction_strength(scores.greedy, scores.content),
        "loss": [-mean for mean in true],
        "loss_per_byte": [
            -mean / len(zlib.compress(pair.completion.encode())) for mean, pair in zip(true, PAIRS, strict=True)
        ],
        "min_k_plus_plus": min_k_plus_plus(token_z_scores(llama, tokenizer, PAIRS), scores.content),
    }
    assert list(expected) == ALL
    found = Scores(measure(ask(), ALL))
    assert list(found) == [Key("set", name) for name in ALL]
    for name, rows in expected.items():
        score = found.of("set", name)
        assert score.rows == pytest.approx(rows, rel=1e-4), name
        if name != "truth_ratio":
            assert score.value == pytest.approx(sum(rows) / len(PAIRS), rel=1e-4), name


def test_every_metric_says_what_it_is(ask):
    for name, metric in METRICS.items():
        assert metric.caption and (metric.rows is None) != (metric.tokens is None), name
        assert metric.average in AVERAGES and metric.average_forget in (None, *AVERAGES), name
    for score in measure(ask(), ALL):
        low, high = METRICS[score.metric].range
        assert low <= score.value <= high, score.metric
    guards = ["unique_tokens", "fluency", "high_entropy", "astray", "expert_0", "expert_12"]
    ingredients = [name for name in METRICS if is_ingredient(name)]
    assert "loss" in ingredients and not any(map(is_guard, ingredients)) and not is_ingredient("acc")
    assert all(map(is_guard, guards)) and not any(map(is_guard, ["rouge", "acc", "model_utility"]))


def test_a_score_says_what_it_depends_on(llama, tokenizer):
    own = {"files": ["a.jsonl"]}
    asked = ModelOnSet(llama, tokenizer, "set", PAIRS, True, 2, 6, attack="sampling", step=3, settings=own)
    alike = {"as_chat": True, "bf16": False, "is_forget": True, **own}
    assert rows_of(asked, "min_k").settings == alike  # the model's own answers have no bearing on it
    assert rows_of(asked, "rouge").settings == {**alike, "answered": 2, "max_new_tokens": 6}
    assert rows_of(asked, "rouge").key == Key("set", "rouge", "sampling", 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert rows_of(asked, "probability").settings["bf16"]
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert not rows_of(ModelOnSet(llama, plain, "set", PAIRS), "min_k").settings["as_chat"]


def test_the_truth_ratio_of_a_set_depends_on_its_side(ask):
    forget, other = (rows_of(ask(is_forget=side), "truth_ratio") for side in (True, False))
    assert forget.rows == other.rows and (forget.average, other.average) == ("near_one", "truthfulness")
    for score in (forget, other):
        assert score.value == Score.averaged("a", "b", forget.rows, score.average).value
    assert forget.value != other.value


def test_the_truth_ratio_takes_the_answer_itself_where_no_set_has_other_words(ask, llama, tokenizer):
    true = [row[0] for row in means(llama, tokenizer, [[pair.completion] for pair in PAIRS])]
    false = means(llama, tokenizer, [list(pair.wrong) for pair in PAIRS])
    found = rows_of(ask(UNPHRASED), "truth_ratio").rows
    assert found == pytest.approx(truth_ratio(true, false), rel=1e-4)
    assert found != pytest.approx(rows_of(ask(), "truth_ratio").rows, rel=0.01)


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
    metrics = ["probability", "normalized_probability", "truth_ratio"]
    probability, normalized, ratio = measure(ModelOnSet(model, tokenizer, "set", PAIRS), metrics)
    assert probability.rows == [0.0] * len(PAIRS)
    assert all(0 <= row <= 1 for row in normalized.rows)
    assert all(math.isfinite(row) for row in ratio.rows)


def test_a_model_is_asked_once(ask, passes):
    asked = ask()
    assert passes == []
    measure(asked, ["probability", "min_k", "exact_memorization"])
    assert passes == [("score_answers", None)]
    for _ in range(2):
        measure(asked, ALL)
    assert sorted(name for name, _ in passes) == ["generate_answers", *["score_answers"] * 3]  # + rephrased, false


def test_answers_are_spread_over_the_set(ask):
    pairs = [Pair(f"What is {number}?", "Seven.") for number in range(10)]
    for answered, expected in ((None, range(10)), (20, range(10)), (5, (0, 2, 4, 6, 8)), (3, (0, 3, 6)), (1, (0,))):
        assert ask(pairs, answered=answered).answered_pairs == [pairs[row] for row in expected]
    assert [len(score.rows) for score in measure(ask(pairs, answered=5), ["rouge", "probability"])] == [5, 10]


def test_the_batch_size_reaches_every_pass(ask, passes):
    metrics = ["normalized_probability", "truth_ratio", "rouge"]
    own, default = measure(ask(batch_size=2), metrics), measure(ask(), metrics)
    assert [size for _, size in passes] == [2] * 4 + [None] * 4
    for one, other in zip(own, default, strict=True):
        assert one.rows == pytest.approx(other.rows, rel=1e-4)


def test_sets_may_be_answered_together(llama, tokenizer, passes):
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama, config).eval()

    def ask(pairs):
        return ModelOnSet(model, tokenizer, "set", pairs, answered=3, max_new_tokens=8)

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
        answer_together([ask(PAIRS), ModelOnSet(model, tokenizer, "set", PAIRS, max_new_tokens=6)], batch_size=2)


def test_astray_is_of_gated_adapters(tokenizer):
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    gated = get_peft_model(make_llama(len(tokenizer)), config).eval()
    for is_forget in (True, False):
        found = rows_of(ModelOnSet(gated, tokenizer, "set", PAIRS, is_forget), "astray")
        assert found.rows == score_answers(gated, tokenizer, PAIRS).astray(is_forget)
    for model in (
        make_llama(len(tokenizer)),
        get_peft_model(make_llama(len(tokenizer)), AlterConfig(router="static")),
    ):
        with pytest.raises(ValueError, match="'astray' was asked of the set 'set', but the model has no adapter"):
            measure(ModelOnSet(model, tokenizer, "set", PAIRS), ["astray"])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_metric(ask):
    with pytest.raises(ValueError, match=r"`metrics` has \['bleurt'\], but must be some of \['probability', "):
        measure(ask(), ["probability", "bleurt"])


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


def test_the_probability_of_other_words_needs_them(ask, passes):
    with pytest.raises(
        ValueError, match="The set 'set' has no `rephrased` answer in row 0, which rephrased_probability needs"
    ):
        measure(ask(UNPHRASED), ["rephrased_probability"])
    assert passes == [] and rows_of(ask(UNPHRASED), "truth_share").rows  # as the truth ratio, of the answer itself


@pytest.mark.parametrize("name", ["answered", "max_new_tokens", "batch_size"])
def test_numbers_below_one(ask, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, but must be 1 or more"):
        ask(**{name: 0})


def test_nothing_to_ask(ask):
    with pytest.raises(ValueError, match="The set 'set': `pairs` is empty"):
        ask([])
