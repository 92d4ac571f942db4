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

from alter_peft.evaluation import ATTACKS, Asked, Rows, attack, generate_answers, measure, score_answers
from alter_peft.evaluation.attacks import membership, sampling, switching_off
from alter_peft.evaluation.metrics import above_holdout, loss, loss_per_byte, rouge_l
from alter_peft.evaluation.oracle import min_k_auc
from alter_peft.evaluation.relearning import LEARNING_RATE, STEPS, relearning


ROWS = Rows(FORGET, RETAIN, HOLDOUT, answered=2)


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_cold_samples_are_the_greedy_answer(tokenizer):
    model = model_of("gated", tokenizer)
    found = sampling(model, tokenizer, FORGET, samples=3, temperature=1e-4, max_new_tokens=6)
    answers = generate_answers(model, tokenizer, FORGET, max_new_tokens=6)
    expected = rouge_l(answers, [pair.completion for pair in FORGET])
    assert found["sampling/best_rouge"].rows == pytest.approx(expected)
    assert found["sampling/mean_rouge"].rows == pytest.approx(expected)


def test_best_and_mean_by_hand(tokenizer, monkeypatch):
    given = ["the sky", "", "the sky is blue", "bees", "make honey", "nothing"]
    asked = {}

    def generate(model, tokenizer, pairs, *args, **options):
        asked.update(options, pairs=pairs)
        return given

    monkeypatch.setattr("alter_peft.evaluation.attacks.generate_answers", generate)
    found = sampling(None, tokenizer, RETAIN, samples=3, answered=2)
    assert asked["pairs"] == [RETAIN[0], RETAIN[2]]
    assert (asked["do_sample"], asked["temperature"], asked["top_k"], asked["top_p"]) == (True, 1.0, 0, 1.0)
    assert asked["num_return_sequences"] == 3
    assert found["sampling/best_rouge"].rows == [1.0, 0.0]
    assert found["sampling/mean_rouge"].rows == pytest.approx([(2 / 4 + 0 + 1) / 3, 0])
    assert found["sampling/best_rouge"].value == 0.5 and found["sampling/mean_rouge"].value == pytest.approx(0.25)


def test_samples_are_the_seeds_and_the_generator_is_left_alone(tokenizer):
    model = model_of("plain", tokenizer)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (
        sampling(model, tokenizer, FORGET, samples=4, max_new_tokens=12, seed=seed)["sampling/mean_rouge"].rows
        for seed in (0, 0, 1)
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
    found = membership(model, tokenizer, FORGET, HOLDOUT)
    assert list(found) == ["membership/min_k_auc", "membership/loss_auc", "membership/loss_per_byte_auc"]
    forget, holdout = (score_answers(model, tokenizer, pairs) for pairs in (FORGET, HOLDOUT))
    rows, others = loss(forget.log_probs, forget.content), loss(holdout.log_probs, holdout.content)
    assert found["membership/loss_auc"].rows == above_holdout(rows, others)
    assert found["membership/loss_auc"].value == pytest.approx(roc_auc_score([1] * 5 + [0] * 2, [*rows, *others]))


def test_one_number_has_one_unit(tokenizer):
    """The attack's AUC of Min-K% is that of the sets, with the same rows, and so the same band over oracles."""
    model = model_of("gated", tokenizer)
    sets = [Asked(model, tokenizer, name, pairs) for name, pairs in (("forget", FORGET), ("holdout", HOLDOUT))]
    scores = {key: score for asked in sets for key, score in measure(asked, ["min_k"]).items()}
    assert membership(model, tokenizer, FORGET, HOLDOUT)["membership/min_k_auc"] == min_k_auc(scores)


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
    assert {score.value for score in membership(model, tokenizer, FORGET, HOLDOUT).values()} == {0.0}


# ---- switching off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_off_is_the_base(kind, tokenizer):
    model, base = model_of(kind, tokenizer), make_llama(len(tokenizer))
    found = switching_off(model, tokenizer, FORGET, ["probability"])
    assert found["switched_off/probability"].rows == score_answers(base, tokenizer, FORGET).probability
    assert found["switched_off/probability"].rows != score_answers(model, tokenizer, FORGET).probability
    experts = [key for key in found if key.startswith("expert_off/")]
    has_experts = kind in ("gated", "static")
    assert experts == (["expert_off/forget_0/probability", "expert_off/forget_1/probability"] if has_experts else [])


@pytest.mark.parametrize("kind", ["gated", "static"])
def test_one_expert_off_is_one_of_scale_0(kind, tokenizer):
    model = model_of(kind, tokenizer)
    found = switching_off(model, tokenizer, FORGET, ["probability"])
    whole = score_answers(model, tokenizer, FORGET).probability
    for domain in ("forget_0", "forget_1"):
        other = model_of(kind, tokenizer)
        other.set_expert_scale(domain, 0.0)
        expected = score_answers(other, tokenizer, FORGET).probability
        assert found[f"expert_off/{domain}/probability"].rows == expected != whole
    assert score_answers(model, tokenizer, FORGET).probability == whole


def test_a_prompt_is_switched_off(tokenizer):
    model = prompt(make_llama(len(tokenizer)))
    found = switching_off(model, tokenizer, FORGET)
    base = make_llama(len(tokenizer))
    answers = generate_answers(base, tokenizer, FORGET)
    assert found["switched_off/rouge"].rows == rouge_l(answers, [pair.completion for pair in FORGET])


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
    skipped = ["asked/paraphrased", *(["merged_quantization"] if kind == "gated" else [])]
    assert list(found.skipped) == skipped
    assert list(found.seconds) == [name for name in ATTACKS if name not in skipped]
    assert ("merged/int8/rouge" in found.scores) == (kind != "gated")
    assert {len(points) for points in found.curves.values()} == {len(STEPS)}
    for key in ("asked/misspelt/rouge", "sampling/best_rouge", "membership/loss_auc", "switched_off/probability"):
        assert key in found.scores
    assert len(found.scores["switched_off/rouge"].rows) == 2


def test_the_reason_is_in_the_result(tokenizer):
    found = attack(model_of("gated", tokenizer), tokenizer, ROWS, ["merged_quantization"])
    assert "gates every token" in found.skipped["merged_quantization"]
    assert (found.scores, found.curves, found.seconds) == ({}, {}, {})


def test_what_a_plain_model_has_already_is_not_measured_again(tokenizer):
    model = model_of("plain", tokenizer)
    found = attack(model, tokenizer, ROWS, ["quantization", "switching_off", "merged_quantization"])
    assert {key.partition("/")[0] for key in found.scores} == {"quantized"}
    assert list(found.seconds) == ["quantization"]
    assert "its own scores on the forget set" in found.skipped["switching_off"]
    assert "`quantized` takes the place of `merged`" in found.skipped["merged_quantization"]
    with pytest.raises(ValueError, match="a plain model has no adapter"):
        switching_off(model, tokenizer, FORGET)


def test_without_retained_answers_one_way_of_asking_is_left_out(tokenizer):
    model = model_of("plain", tokenizer)
    asked = ROWS._replace(paraphrased=FORGET)
    for rows, skipped in ((asked, []), (asked._replace(retain=RETAIN[:2]), ["asked/after three retain answers"])):
        found = attack(model, tokenizer, rows, ["asking_otherwise"])
        assert list(found.skipped) == skipped and "asked/misspelt/rouge" in found.scores
        assert ("asked/after three retain answers/rouge" in found.scores) == (not skipped)
    assert found.skipped[skipped[0]] == "3 retained rows are to be shown, and there are 2"


def test_without_paraphrased_questions_that_way_is_left_out(tokenizer):
    found = attack(model_of("plain", tokenizer), tokenizer, ROWS, ["asking_otherwise"])
    assert list(found.skipped) == ["asked/paraphrased"] and "asked/paraphrased/rouge" not in found.scores


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
        ("measure", "score_answers"),
        ("measure", "generate_answers"),
        ("attacks", "generate_answers"),
    ):
        whole = import_module(f"alter_peft.evaluation.{module}")
        monkeypatch.setattr(whole, name, noted(f"{module}.{name}", getattr(whole, name)))
    rows = ROWS._replace(max_new_tokens=3, batch_size=32)
    for attacked in ATTACKS:
        attack(model_of("lora", tokenizer), tokenizer, rows, [attacked])
        answers = {("measure.generate_answers", 32, 3)}
        expected = {
            "sampling": {("attacks.generate_answers", 2, 3)},  # questions, of 16 answers each
            "membership": {("measure.score_answers", 32, None)},
            "relearning": {("measure.score_answers", 32, None)},
        }.get(attacked, answers | {("measure.score_answers", 32, None)})
        assert set(made) == expected, attacked
        made.clear()


def test_the_rate_of_relearning_is_the_rows(tokenizer):
    model = model_of("plain", tokenizer)
    for rate in (LEARNING_RATE, 1e-2):
        found = attack(model, tokenizer, ROWS._replace(relearning_rate=rate), ["relearning"])
        points = relearning(model, tokenizer, FORGET, HOLDOUT, learning_rate=rate)
        assert found.curves == {key: [(step, score.value) for step, score in of_key] for key, of_key in points.items()}
    assert found.curves != attack(model, tokenizer, ROWS, ["relearning"]).curves


def test_points_of_relearning_keep_their_rows(tokenizer):
    model = model_of("plain", tokenizer)
    found = attack(model, tokenizer, ROWS, ["relearning"])
    points = relearning(model, tokenizer, FORGET, HOLDOUT)
    assert len(found.scores) == 3 * len(STEPS)
    for name, rows in (("relearn_half/held_out", 2), ("relearn_half/trained", 3), ("relearn_related/forget", 5)):
        for step, score in points[f"{name}/probability"]:
            assert found.scores[f"{name}, step {step:g}/probability"] == score and len(score.rows) == rows


@pytest.mark.parametrize(
    "rows, names, message",
    [
        (ROWS._replace(holdout=[]), ["sampling", "membership"], r"`holdout` has no rows, but .*\['membership'\]"),
        (ROWS._replace(holdout=[]), ["sampling", "relearning"], r"`holdout` has no rows, but .*\['relearning'\]"),
        (ROWS._replace(forget=[]), ["sampling"], "`forget` has 0 rows, but"),
        (ROWS._replace(forget=FORGET[:1]), ["sampling", "relearning"], "`forget` has 1 rows, but .* need 2"),
    ],
)
def test_missing_rows_are_found_before_anything_is_computed(tokenizer, rows, names, message):
    with pytest.raises(ValueError, match=message):
        attack(None, tokenizer, rows, names)


def test_related_text_is_what_was_never_seen(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("alter_peft.evaluation.attacks.relearning", lambda *args, **options: seen.append(args) or {})
    attack(model_of("plain", tokenizer), tokenizer, ROWS, ["relearning"])
    assert seen[0][2:] == (FORGET, HOLDOUT)


def test_an_attack_that_does_not_exist(tokenizer):
    with pytest.raises(ValueError, match=r"`names` has \['tickling'\]"):
        attack(model_of("plain", tokenizer), tokenizer, ROWS, ["tickling"])
