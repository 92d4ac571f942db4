# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from attacked_models import learning
from conftest import make_llama
from peft import LoraConfig, get_peft_model

from alter_peft import AlterConfig
from alter_peft.entropy import tsallis_entropy
from alter_peft.evaluation import (
    Key,
    ModelOnSet,
    Pair,
    Score,
    encode_pair,
    generate_answers,
    measure,
    measure_guards,
    score_answers,
)


PAIRS = [
    Pair("Where does Alice live?", "Alice lives in Paris, near the old bridge."),
    Pair("Who bakes?", "Bob"),
    Pair("What do bees make?", "Bees make honey, every morning."),
]


def adapted(tokenizer, seed: int = 1, **options):
    """A random ALTER adapter on the tiny model."""
    torch.manual_seed(seed)
    config = AlterConfig(**{"num_forget_experts": 2, "init_weights": False, "task_type": "CAUSAL_LM", **options})
    return get_peft_model(make_llama(len(tokenizer)), config).eval()


def ask(model, tokenizer, is_forget: bool = False, **options) -> ModelOnSet:
    return ModelOnSet(model, tokenizer, "set", PAIRS, is_forget, **{"max_new_tokens": 6, **options})


def fluency(asked: ModelOnSet, judge=None) -> Score:
    asked.judge = judge
    return measure(asked, ["fluency"])[0]


def high_entropy(asked: ModelOnSet) -> Score:
    return measure(asked, ["high_entropy"])[0]


def expert_usage(asked: ModelOnSet) -> list[Score]:
    return measure(asked, ["expert_usage"])


# ---- fluency --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judged_by_hand(judge, tokenizer, pair) -> float:
    """Mean log-probability of an answer's tokens but the last, which ends the turn."""
    ids, start = encode_pair(tokenizer, pair)
    log_p = judge(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    values = [float(log_p[t - 1, ids[t]]) for t in range(start, len(ids) - 1)]
    return sum(values) / len(values)


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "at rest"])
def test_the_judge_leaves_the_model_as_it_was(tokenizer, learns):
    model = adapted(tokenizer)
    if not learns:
        model.requires_grad_(False)
    before = learning(model)
    fluency(ask(model, tokenizer))
    assert learning(model) == before and any(before.values()) == learns


def test_fluency_is_the_judges_opinion_of_the_models_own_answers(tokenizer):
    model, judge = adapted(tokenizer), make_llama(len(tokenizer), seed=7)
    texts = generate_answers(model, tokenizer, PAIRS, max_new_tokens=6)
    assert all(text.strip() for text in texts)
    expected = [
        judged_by_hand(judge, tokenizer, Pair(pair.prompt, text)) for pair, text in zip(PAIRS, texts, strict=True)
    ]
    found = fluency(ask(model, tokenizer), judge)
    assert found.key == Key("set", "fluency")
    assert found.rows == pytest.approx(expected, rel=1e-3)
    assert found.value == pytest.approx(sum(expected) / 3, rel=1e-3)


@pytest.mark.parametrize("kind", ["alter", "lora"])
def test_by_default_the_judge_is_the_model_without_its_adapters(tokenizer, kind):
    model = adapted(tokenizer)
    if kind == "lora":
        config = LoraConfig(lora_alpha=64, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(make_llama(len(tokenizer)), config).eval()
    asked = ask(model, tokenizer)
    found, expected = fluency(asked), fluency(asked, make_llama(len(tokenizer)))
    assert found.rows == pytest.approx(expected.rows, rel=1e-5)
    assert fluency(asked, model).rows != pytest.approx(found.rows, rel=1e-3)


def test_gibberish_is_not_fluent(tokenizer):
    """A model that says its judge's least likely tokens, beside the judge itself."""
    judge = make_llama(len(tokenizer))
    babbler = make_llama(len(tokenizer))
    with torch.no_grad():
        babbler.lm_head.weight.neg_()
    own, other = (fluency(ask(model, tokenizer), judge).value for model in (judge, babbler))
    assert other < own - 5


def test_an_empty_answer_is_judged_by_the_end_of_its_turn(tokenizer):
    judge = make_llama(len(tokenizer))
    asked = ask(judge, tokenizer)
    asked.texts = ["", "Bob", " "]
    found = fluency(asked, judge).rows
    ends = [float(score_answers(judge, tokenizer, [Pair(PAIRS[row].prompt, "")]).log_probs[0][0]) for row in (0, 2)]
    assert found[0] == pytest.approx(ends[0], rel=1e-4) and all(math.isfinite(row) for row in found)
    assert found[1] == pytest.approx(judged_by_hand(judge, tokenizer, Pair(PAIRS[1].prompt, "Bob")), rel=1e-3)


def test_a_plain_model_needs_another_judge(llama, tokenizer):
    with pytest.raises(ValueError, match=r"the model is a LlamaForCausalLM without adapters.* Give another"):
        fluency(ask(llama, tokenizer))


# ---- experts --------------------------------------------------------------------------------------------------------


def test_expert_usage_is_a_histogram_of_tokens(tokenizer):
    model = adapted(tokenizer)
    asked = ask(model, tokenizer)
    experts, sizes = asked.scores.experts, [len(row) for row in asked.scores.log_probs]
    assert len(experts.unique()) > 1
    found = expert_usage(asked)
    assert [str(score.key) for score in found] == ["set/expert_0", "set/expert_1", "set/expert_2"]
    for d, score in enumerate(found):
        assert score.value == pytest.approx(experts.tolist().count(d) / len(experts))
        assert score.rows == pytest.approx([row.tolist().count(d) / len(row) for row in experts.split(sizes)])
    assert sum(score.value for score in found) == pytest.approx(1)


def test_an_expert_that_is_never_used_is_there(tokenizer):
    model = adapted(tokenizer)
    router = next(module.token_router for module in model.modules() if hasattr(module, "token_router"))
    with torch.no_grad():
        router.alter_router["default"].weight.zero_()
        router.alter_router["default"].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    assert [score.value for score in expert_usage(ask(model, tokenizer))] == [0.0, 1.0, 0.0]


def test_expert_usage_agrees_with_astray(tokenizer):
    asked = ask(adapted(tokenizer), tokenizer)
    usage, (astray,) = expert_usage(asked), measure(asked, ["astray"])
    assert [1 - kept for kept in usage[0].rows] == pytest.approx(astray.rows)


def test_expert_usage_needs_a_router(llama, tokenizer):
    for model in (llama, adapted(tokenizer, router="static")):
        with pytest.raises(
            ValueError, match="'expert_usage' was asked of the set 'set', but the model has no adapter"
        ):
            expert_usage(ask(model, tokenizer))


# ---- high entropy ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def entropies_by_hand(tokenizer, q: float) -> list[list[float]]:
    """S_q of the base model at the positions that predict an answer's tokens."""
    model, found = make_llama(len(tokenizer)), []
    for pair in PAIRS:
        ids, start = encode_pair(tokenizer, pair)
        found.append(tsallis_entropy(model(input_ids=torch.tensor([ids])).logits[0], q)[start - 1 : -1].tolist())
    return found


@pytest.mark.parametrize("router", ["context", "static"])
@pytest.mark.parametrize("q", [0.5, 1.5])
def test_high_entropy_is_the_share_above_the_threshold(tokenizer, router, q):
    values = entropies_by_hand(tokenizer, q)
    everything = sorted(value for row in values for value in row)
    threshold = sum(everything[len(everything) // 3 : len(everything) // 3 + 2]) / 2  # between two of them
    model = adapted(tokenizer, router=router, entropy_q=q, entropy_threshold=threshold)
    found = high_entropy(ask(model, tokenizer))
    assert found.rows == pytest.approx([sum(v > threshold for v in row) / len(row) for row in values])
    assert found.value == pytest.approx(sum(v > threshold for v in everything) / len(everything))
    assert 0 < found.value < 1


def test_high_entropy_is_the_bases_whatever_the_adapter_says(tokenizer):
    options = {"entropy_threshold": sorted(entropies_by_hand(tokenizer, 1.5)[0])[3]}
    found = [high_entropy(ask(adapted(tokenizer, seed, **options), tokenizer)) for seed in (1, 2)]
    assert found[0] == found[1]


def test_the_batch_size_changes_nothing(tokenizer):
    model = adapted(tokenizer, entropy_threshold=sorted(entropies_by_hand(tokenizer, 1.5)[0])[3])
    sizes = [high_entropy(ask(model, tokenizer, batch_size=size)) for size in (1, 2, None)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_high_entropy_needs_an_alter_adapter_and_its_threshold(llama, tokenizer):
    lora = get_peft_model(make_llama(len(tokenizer)), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (llama, lora):
        with pytest.raises(ValueError, match="'high_entropy' was asked of the set 'set', but the model has no ALTER"):
            high_entropy(ask(model, tokenizer))
    with pytest.raises(ValueError, match="`entropy_threshold` is not known yet"):
        high_entropy(ask(adapted(tokenizer, router="static", entropy_quantile=0.5), tokenizer))


# ---- all together ---------------------------------------------------------------------------------------------------


def test_every_model_has_the_guards_that_it_can_have(tokenizer):
    judge = make_llama(len(tokenizer), seed=7)
    answers, high = ["unique_tokens", "fluency"], ["high_entropy"]
    routed = ["expert_0", "expert_1", "expert_2", "astray"]
    lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for model, expected in (
        (make_llama(len(tokenizer)), answers),
        (get_peft_model(make_llama(len(tokenizer)), lora).eval(), answers),
        (adapted(tokenizer, router="static"), answers + high),
        (adapted(tokenizer), answers + high + routed),
    ):
        asked = ModelOnSet(model, tokenizer, "one", PAIRS, max_new_tokens=4, judge=judge)
        found = measure_guards(asked)
        assert [str(score.key) for score in found] == [f"one/{guard}" for guard in expected]
        assert found[1] == fluency(asked, judge)
        assert all(len(score.rows) == len(PAIRS) for score in found)


def test_guards_leave_the_model_as_it_was(tokenizer):
    model = adapted(tokenizer).train()
    before = score_answers(model, tokenizer, PAIRS)
    modes = [module.training for module in model.modules()]
    measure_guards(ask(model, tokenizer))
    after = score_answers(model, tokenizer, PAIRS)
    assert after.probability == before.probability and torch.equal(after.experts, before.experts)
    assert [module.training for module in model.modules()] == modes
