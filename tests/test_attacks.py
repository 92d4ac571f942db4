# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import zlib
from importlib import import_module
from inspect import signature

import pytest
import torch
from attacked_models import FORGET, HOLDOUT, KINDS, RETAIN, assert_unchanged, learning, model_of, prompt, snapshot
from conftest import make_llama
from sklearn.metrics import roc_auc_score

from alter_peft.evaluation import (
    ATTACKS,
    METRICS,
    Key,
    ModelOnSet,
    Rows,
    Score,
    Scores,
    attack,
    generate_answers,
    measure,
    score_answers,
)
from alter_peft.evaluation.attacks import LEARNING_RATE, control
from alter_peft.evaluation.attacks.membership import membership
from alter_peft.evaluation.attacks.relearning import STEPS, relearning
from alter_peft.evaluation.attacks.sampling import sampling
from alter_peft.evaluation.attacks.switching_off import switching_off
from alter_peft.evaluation.metrics.membership import above_holdout, loss, loss_per_byte
from alter_peft.evaluation.metrics.text import rouge_l
from alter_peft.evaluation.oracle import min_k_auc


ROWS = Rows(FORGET, RETAIN, HOLDOUT, answered=2)
ALL = Rows(FORGET)


def of(scores: list[Score], set: str, metric: str) -> Score:
    (found,) = (score for score in scores if (score.set, score.metric) == (set, metric))
    return found


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_cold_samples_are_the_greedy_answer(tokenizer):
    model = model_of("gated", tokenizer)
    best, mean = sampling(model, tokenizer, ALL._replace(max_new_tokens=6), samples=3, temperature=1e-4)
    answers = generate_answers(model, tokenizer, FORGET, max_new_tokens=6)
    expected = rouge_l(answers, [pair.completion for pair in FORGET])
    assert best.rows == pytest.approx(expected) and mean.rows == pytest.approx(expected)


def test_best_and_mean_by_hand(llama, tokenizer, monkeypatch):
    given = ["the sky", "", "the sky is blue", "bees", "make honey", "nothing"]
    asked = {}

    def generate(model, tokenizer, pairs, *args, **options):
        asked.update(options, pairs=pairs)
        return given

    monkeypatch.setattr("alter_peft.evaluation.attacks.sampling.generate_answers", generate)
    best, mean = sampling(llama, tokenizer, Rows(RETAIN, answered=2), samples=3)
    assert asked["pairs"] == [RETAIN[0], RETAIN[2]]
    assert (asked["do_sample"], asked["temperature"], asked["top_k"], asked["top_p"]) == (True, 1.0, 0, 1.0)
    assert asked["num_return_sequences"] == 3
    assert [score.key for score in (best, mean)] == [
        Key("forget", metric, "sampling") for metric in ("best_rouge", "mean_rouge")
    ]
    assert best.rows == [1.0, 0.0] and mean.rows == pytest.approx([(2 / 4 + 0 + 1) / 3, 0])
    assert best.value == 0.5 and mean.value == pytest.approx(0.25)


def test_samples_are_the_seeds_and_the_generator_is_left_alone(tokenizer):
    model = model_of("plain", tokenizer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (
        sampling(model, tokenizer, ALL._replace(max_new_tokens=12), samples=4, seed=seed)[1].rows for seed in (0, 0, 1)
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)


# ---- membership -----------------------------------------------------------------------------------------------------


def test_statistics_by_hand():
    log_probs, content = [torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([-0.5, -9.0])], [3, 1]
    assert loss(log_probs, content) == [3.0, 0.5]
    texts = ["a" * 40, "Zürich"]
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    assert loss_per_byte(log_probs, content, texts) == [3.0 / sizes[0], 0.5 / sizes[1]]
    assert sizes[0] < 40


def test_membership_is_the_auc_of_forget_against_holdout(tokenizer):
    model = model_of("gated", tokenizer)
    found = membership(model, tokenizer, ROWS)
    assert [score.key for score in found] == [
        Key("forget", f"{name}_auc", "membership") for name in ("min_k", "loss", "loss_per_byte")
    ]
    forget, holdout = (score_answers(model, tokenizer, pairs) for pairs in (FORGET, HOLDOUT))
    rows, others = loss(forget.log_probs, forget.content), loss(holdout.log_probs, holdout.content)
    assert found[1].rows == above_holdout(rows, others)
    assert found[1].value == pytest.approx(roc_auc_score([1] * 5 + [0] * 2, [*rows, *others]))


def test_one_number_has_one_unit(tokenizer):
    """The attack's AUC of Min-K% is that of the sets, with the same rows, and so the same band over oracles."""
    model = model_of("gated", tokenizer)
    sets = [ModelOnSet(model, tokenizer, name, pairs) for name, pairs in (("forget", FORGET), ("holdout", HOLDOUT))]
    expected = min_k_auc(Scores(score for asked in sets for score in measure(asked, ["min_k"])))
    found = membership(model, tokenizer, ROWS)[0]
    assert (found.value, found.rows, found.average) == (expected.value, expected.rows, expected.average)


def test_what_was_trained_on_is_told_from_what_was_not(tokenizer):
    model = make_llama(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        for pair in FORGET:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}],
                return_dict=True, return_tensors="pt",
            )["input_ids"]  # fmt: skip
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {score.value for score in membership(model, tokenizer, ROWS)} == {0.0}


# ---- switching off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_off_is_the_base(kind, tokenizer):
    model, base = model_of(kind, tokenizer), make_llama(len(tokenizer))
    off, *of_experts = switching_off(model, tokenizer, ALL, ["probability"])
    assert off.key == Key("forget", "probability", "switching_off")
    assert off.rows == score_answers(base, tokenizer, FORGET).probability
    assert off.rows != score_answers(model, tokenizer, FORGET).probability
    sets = [score.set for score in of_experts]
    has_experts = kind in ("gated", "static")
    assert sets == (["forget without forget_0", "forget without forget_1"] if has_experts else [])


@pytest.mark.parametrize("kind", ["gated", "static"])
def test_one_expert_off_is_one_of_scale_0(kind, tokenizer):
    model = model_of(kind, tokenizer)
    found = switching_off(model, tokenizer, ALL, ["probability"])
    whole = score_answers(model, tokenizer, FORGET).probability
    for domain in ("forget_0", "forget_1"):
        other = model_of(kind, tokenizer)
        other.set_expert_scale(domain, 0.0)
        expected = score_answers(other, tokenizer, FORGET).probability
        assert of(found, f"forget without {domain}", "probability").rows == expected != whole
    assert score_answers(model, tokenizer, FORGET).probability == whole


def test_a_prompt_is_switched_off(tokenizer):
    model = prompt(make_llama(len(tokenizer)))
    found = switching_off(model, tokenizer, ALL)
    base = make_llama(len(tokenizer))
    answers = generate_answers(base, tokenizer, FORGET)
    assert of(found, "forget", "rouge").rows == rouge_l(answers, [pair.completion for pair in FORGET])


# ---- attack ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "at rest"])
@pytest.mark.parametrize("kind", ["lora", "gated"])
def test_every_attack_leaves_the_model_as_it_was(kind, learns, tokenizer):
    model = model_of(kind, tokenizer)
    if not learns:
        model.requires_grad_(False)
    learn, config = learning(model), model.generation_config
    before, probability = snapshot(model), score_answers(model, tokenizer, FORGET).probability
    found = attack(model, tokenizer, ROWS)
    assert_unchanged(model, before)
    assert learning(model) == learn and any(learn.values()) == learns and model.generation_config is config
    assert score_answers(model, tokenizer, FORGET).probability == probability
    skipped = ["asking_otherwise/paraphrased", *(["merged_quantization"] if kind == "gated" else [])]
    assert list(found.skipped) == skipped
    assert list(found.seconds) == [name for name in ATTACKS if name not in skipped]
    assert (Key("forget, 8 bits", "rouge", "merged_quantization") in found.scores) == (kind != "gated")
    for key in (
        Key("misspelt", "rouge", "asking_otherwise"),
        Key("forget", "best_rouge", "sampling"),
        Key("forget", "loss_auc", "membership"),
        Key("forget, 4 bits", "rouge", "quantization"),
        Key("trained half", "probability", "relearning", 50),
    ):
        assert key in found.scores
    assert len(found.scores.of("forget", "rouge", "switching_off").rows) == 2
    assert {key.attack for key in found.scores} == set(found.seconds)
    known = METRICS.keys() | {metric for entry in ATTACKS.values() for metric in entry.metrics}
    assert {key.metric for key in found.scores} <= known


def test_every_attack_says_what_it_is():
    for entry in ATTACKS.values():
        assert entry.caption and ("adapter" in entry.needs) == bool(entry.plain)
        assert set(entry.needs) <= {"holdout", "adapter", "two rows"}


def test_what_takes_the_place_of_an_attack_on_an_adapter():
    own, rounded = Score("forget", "rouge", 0.1), Score("forget, 4 bits", "rouge", 0.2, attack="quantization")
    oracle = Scores([own, rounded])
    assert control(oracle, own.key) is own
    assert control(oracle, Key("forget", "rouge", "switching_off")) is own
    assert control(oracle, Key("forget, 4 bits", "rouge", "merged_quantization")) is rounded
    for key in (
        Key("forget without a", "rouge", "switching_off"),
        Key("forget", "bleu", "switching_off"),
        Key("forget", "rouge", "relearning", 5),
        Key("request 1", "probability", None, 1),
    ):
        assert control(oracle, key) is None


def test_a_score_says_what_it_was_attacked_with(tokenizer):
    rows = ROWS._replace(settings={"files": ["a.jsonl"], "holdout": ["b.jsonl"]}, relearning_rate=1e-3)
    names = ["asking_otherwise", "sampling", "membership", "relearning"]
    found = attack(model_of("plain", tokenizer), tokenizer, rows, names)
    alike = {"as_chat": True, "bf16": False, "is_forget": True, "files": ["a.jsonl"]}
    answers, unseen = {"answered": 2, "max_new_tokens": 40}, {"holdout": ["b.jsonl"]}
    for key, expected in (
        (Key("misspelt", "rouge", "asking_otherwise"), {**alike, **answers}),
        (Key("misspelt", "probability", "asking_otherwise"), alike),
        (Key("forget", "best_rouge", "sampling"), {**alike, **answers, "samples": 16, "temperature": 1.0}),
        (Key("forget", "loss_auc", "membership"), {**alike, **unseen}),
        (Key("trained half", "probability", "relearning", 0), {**alike, **unseen, "relearning_rate": 1e-3}),
    ):
        assert found.scores[key].settings == expected, key


def test_the_reason_is_in_the_result(tokenizer):
    found = attack(model_of("gated", tokenizer), tokenizer, ROWS, ["merged_quantization"])
    assert "gates every token" in found.skipped["merged_quantization"]
    assert (found.scores, found.seconds) == ({}, {})


def test_what_a_plain_model_has_already_is_not_measured_again(tokenizer):
    model = model_of("plain", tokenizer)
    found = attack(model, tokenizer, ROWS, ["quantization", "switching_off", "merged_quantization"])
    assert {key.attack for key in found.scores} == {"quantization"}
    assert list(found.seconds) == ["quantization"]
    assert "its own scores on the forget set" in found.skipped["switching_off"]
    assert "`quantization` takes the place of this" in found.skipped["merged_quantization"]
    with pytest.raises(ValueError, match="a plain model has no adapter"):
        switching_off(model, tokenizer, ALL)


def test_without_retained_answers_one_way_of_asking_is_left_out(tokenizer):
    model = model_of("plain", tokenizer)
    asked = ROWS._replace(paraphrased=FORGET)
    for rows, skipped in (
        (asked, []),
        (asked._replace(retain=RETAIN[:2]), ["asking_otherwise/after three retain answers"]),
    ):
        found = attack(model, tokenizer, rows, ["asking_otherwise"])
        assert list(found.skipped) == skipped and Key("misspelt", "rouge", "asking_otherwise") in found.scores
        shown = Key("after three retain answers", "rouge", "asking_otherwise")
        assert (shown in found.scores) == (not skipped)
    assert found.skipped[skipped[0]] == "3 retained rows are to be shown, and there are 2"


def test_without_paraphrased_questions_that_way_is_left_out(tokenizer):
    found = attack(model_of("plain", tokenizer), tokenizer, ROWS, ["asking_otherwise"])
    assert list(found.skipped) == ["asking_otherwise/paraphrased"]
    assert Key("paraphrased", "rouge", "asking_otherwise") not in found.scores


def test_length_and_batches_are_the_rows(tokenizer, monkeypatch):
    """Of all that is answered and scored, in every attack."""
    made = []

    def noted(name, function):
        def call(*args, **options):
            given = signature(function).bind(*args, **options).arguments
            made.append((name, given.get("batch_size"), given.get("max_new_tokens")))
            return function(*args, **options)

        return call

    for module, name in (
        ("model_on_set", "score_answers"),
        ("model_on_set", "generate_answers"),
        ("attacks.sampling", "generate_answers"),
    ):
        whole = import_module(f"alter_peft.evaluation.{module}")
        monkeypatch.setattr(whole, name, noted(f"{module}.{name}", getattr(whole, name)))
    rows = ROWS._replace(max_new_tokens=3, batch_size=32)
    for attacked in ATTACKS:
        attack(model_of("lora", tokenizer), tokenizer, rows, [attacked])
        answers = {("model_on_set.generate_answers", 32, 3)}
        expected = {
            "sampling": {("attacks.sampling.generate_answers", 2, 3)},  # questions, of 16 answers each
            "membership": {("model_on_set.score_answers", 32, None)},
            "relearning": {("model_on_set.score_answers", 32, None)},
        }.get(attacked, answers | {("model_on_set.score_answers", 32, None)})
        assert set(made) == expected, attacked
        made.clear()


def test_the_rate_of_relearning_is_the_rows(tokenizer):
    model = model_of("plain", tokenizer)
    for rate in (LEARNING_RATE, 1e-2):
        rows = ROWS._replace(relearning_rate=rate)
        found = attack(model, tokenizer, rows, ["relearning"])
        assert found.scores == Scores(relearning(model, tokenizer, rows))
    assert found.scores != attack(model, tokenizer, ROWS, ["relearning"]).scores


def test_points_of_relearning_keep_their_rows(tokenizer):
    found = attack(model_of("plain", tokenizer), tokenizer, ROWS, ["relearning"])
    for name, rows in (("held-out half", 2), ("trained half", 3), ("forget after related", 5)):
        points = [score for key, score in found.scores.items() if key.set == name]
        assert [score.step for score in points] == list(STEPS) and {len(score.rows) for score in points} == {rows}


@pytest.mark.parametrize(
    "rows, names, message",
    [
        (ROWS._replace(holdout=[]), ["sampling", "membership"], r"`holdout` has no rows, but .*\['membership'\]"),
        (ROWS._replace(holdout=[]), ["sampling", "relearning"], r"`holdout` has no rows, but .*\['relearning'\]"),
        (ROWS._replace(forget=[]), ["sampling"], "`forget` has 0 rows, but"),
        (ROWS._replace(forget=FORGET[:1]), ["sampling", "relearning"], "`forget` has 1 row, but .* need 2"),
    ],
)
def test_missing_rows_are_found_before_anything_is_computed(tokenizer, rows, names, message):
    with pytest.raises(ValueError, match=message):
        attack(None, tokenizer, rows, names)


def test_related_text_is_what_was_never_seen(tokenizer, monkeypatch):
    seen = []
    module = "alter_peft.evaluation.attacks.relearning.relearn"
    monkeypatch.setattr(module, lambda *args, **options: seen.append(args[3:]) or [])
    attack(model_of("plain", tokenizer), tokenizer, ROWS, ["relearning"])
    assert seen[0] == (FORGET[::2], {"held-out half": FORGET[1::2], "trained half": FORGET[::2]})
    assert seen[1] == (HOLDOUT, {"forget after related": FORGET})


def test_an_attack_that_does_not_exist(tokenizer):
    with pytest.raises(ValueError, match=r"`names` has \['tickling'\]"):
        attack(model_of("plain", tokenizer), tokenizer, ROWS, ["tickling"])
