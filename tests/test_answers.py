# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from attacked_models import model_of
from conftest import make_llama
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_setup import forget_rows, make_trainer, retain_rows
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from alter_peft import AlterConfig
from alter_peft.evaluation import (
    AnswerScores,
    Pair,
    answers,
    chat_or_plain,
    encode_pair,
    generate_answers,
    score_answers,
)
from alter_peft.evaluation.answers import routes_tokens, spread
from alter_peft.evaluation.metrics.membership import min_k
from alter_peft.scoring import ScoredModel


PAIRS = [
    Pair("Where does Alice live?", " Alice lives in Paris, near the old bridge."),
    Pair("Who bakes?", " Bob"),
    Pair("What is the budget of project Falcon? Take your time.", " Seven million."),
    Pair("What do bees make?", " Bees make honey, every morning."),
    Pair("What colour is the sky?", " The sky is blue."),
]


@pytest.fixture
def plain(tokenizer):
    """The tokenizer without its chat template."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.fixture
def adapted(llama):
    """A random adapter and a random router of two forget experts."""
    torch.manual_seed(1)
    return get_peft_model(llama, AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")).eval()


# ---- how questions are asked ----------------------------------------------------------------------------------------


def test_spread():
    assert spread("abcdefghij", 4) == ["a", "c", "f", "h"]
    assert spread("abc", None) == spread("abc", 7) == ["a", "b", "c"]
    for length in range(1, 30):
        for count in range(1, length + 1):
            found = spread(range(length), count)
            assert len(set(found)) == count and found[0] == 0
            assert max(b - a for a, b in zip(found, [*found[1:], length], strict=True)) <= -(-length // count)


def test_a_chat_or_plain_text(tokenizer, plain):
    assert chat_or_plain(tokenizer) is tokenizer and chat_or_plain(tokenizer, True) is tokenizer
    assert chat_or_plain(plain) is plain and chat_or_plain(plain, False) is plain
    bare = chat_or_plain(tokenizer, False)
    assert bare.chat_template is None and tokenizer.chat_template is not None
    assert encode_pair(bare, PAIRS[0]) == encode_pair(plain, PAIRS[0]) != encode_pair(tokenizer, PAIRS[0])
    with pytest.raises(ValueError, match="`as_chat` is True, but the tokenizer has no chat template"):
        chat_or_plain(plain, True)


# ---- encode_pair ----------------------------------------------------------------------------------------------------


def test_a_pair_is_a_chat_where_there_is_a_template(tokenizer):
    ids, start = encode_pair(tokenizer, Pair("Who bakes the bread?", "Bob"))
    assert tokenizer.decode(ids[:start]) == "<|user|>Who bakes the bread?<|end|><|assistant|>"
    assert tokenizer.decode(ids[start:]) == "Bob<|end|>"


@pytest.mark.parametrize("completion", [" Bob", "Bob", "\nBob"])
def test_a_pair_is_plain_text_where_there_is_none(plain, completion):
    """Nothing is put between prompt and completion."""
    ids, start = encode_pair(plain, Pair("Who bakes the bread?", completion))
    assert plain.decode(ids[:start]) == "Who bakes the bread?"
    assert plain.decode(ids[start:]) == f"{completion}<|end|>"


def test_eos_is_added_once(plain):
    assert encode_pair(plain, Pair("Who?", " Bob<|end|>")) == encode_pair(plain, Pair("Who?", " Bob"))


def test_tokens_that_merge_over_the_border_belong_to_the_answer(plain):
    joined = plain("the")["input_ids"]
    assert len(joined) == 1 != len(plain("t")["input_ids"] + plain("he")["input_ids"])
    ids, start = encode_pair(plain, Pair("Where? t", "he bridge"))
    assert plain.decode(ids[:start]) == "Where?" and plain.decode(ids[start:]) == " the bridge<|end|>"


@pytest.fixture
def ends_every_text(plain):
    """A tokenizer that appends EOS, as T5's do."""
    end = (plain.eos_token, plain.eos_token_id)
    plain.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert plain("Who?")["input_ids"][-1] == plain.eos_token_id
    return plain


def test_the_prompts_own_eos_is_no_part_of_the_pair(ends_every_text):
    ids, start = encode_pair(ends_every_text, Pair("Who bakes the bread?", " Bob"))
    assert ends_every_text.decode(ids[:start]) == "Who bakes the bread?"
    assert ends_every_text.decode(ids[start:]) == " Bob<|end|><|end|>"


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
def test_a_given_beginning_is_no_part_of_the_answer(tokenizer, plain, template):
    used = tokenizer if template else plain
    whole, start = encode_pair(used, Pair("Who bakes the bread?", "Bob bakes it."))
    ids, given = encode_pair(used, Pair("Who bakes the bread?", " bakes it.", given="Bob"))
    assert ids == whole and given > start
    assert used.decode(ids[start:given]) == "Bob" and used.decode(ids[given:]) == " bakes it.<|end|>"


@pytest.mark.parametrize("kind", ["tokenizer", "plain", "ends_every_text"])
def test_a_pair_is_encoded_as_trl_trains_it(kind, request, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    own = request.getfixturevalue(kind)
    rows, chat = forget_rows(4), own.chat_template is not None

    def convert(row):
        if not chat:
            return row
        roles = (("prompt", "user"), ("completion", "assistant"))
        return {**row, **{name: [{"role": role, "content": row[name]}] for name, role in roles}}

    forget, retain = ([convert(row) for row in part] for part in (rows, retain_rows(2)))
    trainer = make_trainer(tmp_path, own, forget=type(rows).from_list(forget), retain=type(rows).from_list(retain))
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        ids, start = encode_pair(own, Pair(row["prompt"], row["completion"]))
        assert list(trained["input_ids"]) == ids
        assert list(trained["labels"]) == [-100] * start + ids[start:]


# ---- score_answers --------------------------------------------------------------------------------------------------


@torch.no_grad()
def probability_by_hand(model, tokenizer, pair) -> float:
    """exp of the mean over the answer's tokens, one after the other, from all logits of one row."""
    ids, start = encode_pair(tokenizer, pair)
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for t in range(start, len(ids)):
        total += math.log(torch.softmax(logits[t - 1], dim=-1)[ids[t]].item())
    return math.exp(total / (len(ids) - start))


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("with_adapter", [True, False], ids=["adapter", "base"])
def test_probability_is_that_of_a_loop_over_all_logits(llama, tokenizer, plain, template, with_adapter, request):
    used = tokenizer if template else plain
    model = request.getfixturevalue("adapted") if with_adapter else llama
    expected = [probability_by_hand(model, used, pair) for pair in PAIRS]
    found = score_answers(model, used, PAIRS, batch_size=2)
    assert found.probability == pytest.approx(expected, rel=1e-4)
    assert found.mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert max(expected) > 2 * min(expected) > 0


def test_order_and_batch_size_change_nothing(adapted, plain):
    whole = score_answers(adapted, plain, PAIRS, batch_size=8)
    sizes = [len(ids) - start for ids, start in (encode_pair(plain, pair) for pair in PAIRS)]
    answers = list(whole.experts.split(sizes))
    assert len({tuple(answer.tolist()) for answer in answers}) == len(PAIRS)  # an order could be seen
    order = [3, 0, 4, 2, 1]
    for size in (1, 2, 3):
        found = score_answers(adapted, plain, [PAIRS[i] for i in order], batch_size=size)
        assert found.probability == pytest.approx([whole.probability[i] for i in order], rel=1e-5)
        assert torch.equal(found.experts, torch.cat([answers[i] for i in order]))


def test_the_model_keeps_its_mode(adapted, plain):
    adapted.train()
    adapted.base_model.model.model.layers[0].eval()
    modes = [module.training for module in adapted.modules()]
    score_answers(adapted, plain, PAIRS[:2])
    generate_answers(adapted, plain, PAIRS[:2], max_new_tokens=1)
    assert [module.training for module in adapted.modules()] == modes


def test_dropout_is_off(plain):
    model = make_llama(len(plain), attention_dropout=0.5)
    expected = score_answers(model, plain, PAIRS).probability
    assert score_answers(model.train(), plain, PAIRS).probability == expected


def test_precision_is_the_callers(llama, plain):
    expected = score_answers(llama, plain, PAIRS).probability
    with torch.autocast("cpu", torch.bfloat16):
        lower = score_answers(llama, plain, PAIRS).probability
    assert lower != expected and lower == pytest.approx(expected, rel=0.5)


def test_no_gradient_is_kept(adapted, plain):
    score_answers(adapted.train(), plain, PAIRS[:2])
    assert all(parameter.grad is None for parameter in adapted.parameters())


# ---- experts --------------------------------------------------------------------------------------------------------


def test_astray_by_hand():
    rows = [torch.zeros(2), torch.zeros(3)]
    scores = AnswerScores(rows, rows, [2, 3], torch.tensor([0, 0, 1, 2, 0]))
    assert scores.astray(is_forget=True) == pytest.approx([1, 1 / 3])
    assert scores.astray(is_forget=False) == pytest.approx([0, 2 / 3])
    assert scores._replace(experts=None).astray(is_forget=True) == []


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_experts_are_those_of_the_answers_tokens(adapted, plain, expert):
    router = next(module.token_router for module in adapted.modules() if hasattr(module, "token_router"))
    with torch.no_grad():
        router.alter_router["default"].weight.zero_()
        router.alter_router["default"].bias.copy_(9.0 * torch.eye(3)[expert])
    scores = score_answers(adapted, plain, PAIRS)
    answers = [ids[start:] for ids, start in (encode_pair(plain, pair) for pair in PAIRS)]
    assert scores.experts.tolist() == [expert] * sum(map(len, answers))
    assert scores.astray(is_forget=True) == [float(expert == 0)] * len(PAIRS)
    assert scores.astray(is_forget=False) == [float(expert > 0)] * len(PAIRS)


def test_no_experts_without_a_gated_adapter(llama, adapted, plain):
    static = get_peft_model(make_llama(len(plain)), AlterConfig(router="static", task_type="CAUSAL_LM"))
    assert score_answers(make_llama(len(plain)), plain, PAIRS).experts is None
    assert score_answers(static, plain, PAIRS).experts is None
    with adapted.disable_adapter():
        scores = score_answers(adapted, plain, PAIRS)
    assert scores.experts is None
    assert scores.probability == score_answers(make_llama(len(plain)), plain, PAIRS).probability


# ---- generate_answers -----------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, tokenizer, pair, tokens: int) -> str:
    """The model's own answer, one token after the other, without a cache."""
    ids, start = encode_pair(tokenizer, pair)
    ids, answer = ids[:start], []
    while len(answer) < tokens and tokenizer.eos_token_id not in answer:
        answer.append(int(model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
def test_answers_are_those_of_a_loop_without_a_cache(adapted, tokenizer, plain, template):
    used = tokenizer if template else plain
    own = [greedy(adapted, used, pair, 8) for pair in PAIRS]
    assert len(set(own)) > 1
    for size in (1, 3, 12):
        assert generate_answers(adapted, used, PAIRS, batch_size=size, max_new_tokens=8) == own


# what a generation_config may hold that makes answers others than those of the model's own probabilities
OWN_WAYS = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(10, 250)]},
    "suppress_tokens": {"suppress_tokens": list(range(10, 250))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(10, 250))},
    "sequence_bias": {"sequence_bias": [[[20], 50.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 20},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [0, 50.0]},
    "min_new_tokens": {"min_new_tokens": 8},
    "min_length": {"min_length": 200},
    "num_beams": {"num_beams": 4, "length_penalty": 3.0},
    "guidance_scale": {"guidance_scale": 5.0},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.2, "bias": 50.0}},
    "filters": {"do_sample": True, "temperature": 5.0, "top_k": 2, "top_p": 0.5, "min_p": 0.9, "typical_p": 0.1},
    "cutoffs": {"do_sample": True, "epsilon_cutoff": 0.9, "eta_cutoff": 0.9},
}


@pytest.mark.parametrize("name", OWN_WAYS)
@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_the_models_own_ways_of_generating_do_not_count(llama, adapted, tokenizer, name, kind):
    model = llama if kind == "base" else adapted
    ids, start = encode_pair(tokenizer, PAIRS[0])
    first = model(input_ids=torch.tensor([ids[:start]])).logits[0, -1].argsort(descending=True)
    model.generation_config.eos_token_id = [1, int(first[1])]  # not the model's first word, but it comes near
    drawing = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}

    def answers():
        torch.manual_seed(0)
        options = {"max_new_tokens": 8}
        return [generate_answers(model, tokenizer, PAIRS, **options, **more) for more in ({}, drawing)]

    expected = answers()
    own = GenerationConfig(**OWN_WAYS[name], eos_token_id=[1, int(first[1])])
    model.generation_config = own
    assert answers() == expected
    assert model.generation_config is own


def test_answers_end_where_the_model_says(llama, tokenizer):
    (whole,) = generate_answers(llama, tokenizer, PAIRS[:1], max_new_tokens=8)
    ids, start = encode_pair(tokenizer, PAIRS[0])
    second = int(llama.generate(torch.tensor([ids[:start]]), do_sample=False, max_new_tokens=2)[0, -1])
    llama.generation_config.eos_token_id = [1, second]
    (short,) = generate_answers(llama, tokenizer, PAIRS[:1], max_new_tokens=8)
    assert whole.startswith(short) and len(short) < len(whole)


def test_an_answer_goes_on_from_what_is_given(adapted, tokenizer):
    first = generate_answers(adapted, tokenizer, PAIRS, max_new_tokens=8)
    begun = [Pair(pair.prompt, "", given=text[:-1]) for pair, text in zip(PAIRS, first, strict=True)]
    prompts = [encode_pair(tokenizer, pair) for pair in begun]
    for pair, (ids, start) in zip(begun, prompts, strict=True):
        assert tokenizer.decode(ids[:start]).endswith(pair.given)
    after = generate_answers(adapted, tokenizer, begun, batch_size=1, max_new_tokens=8)
    own = [greedy(adapted, tokenizer, pair, 8) for pair in begun]
    assert after == own


class _Casts(TorchDispatchMode):
    """Shapes of the float32 tensors that are cast to bfloat16 inside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_under_autocast_frozen_weights_are_cast_once(adapted, tokenizer):
    """By itself autocast keeps the copies of weights that learn alone, and casts the rest for each token."""
    learning = [weight.requires_grad for weight in adapted.parameters()]
    head = adapted.get_base_model().get_output_embeddings().weight
    assert not head.requires_grad
    found = {}
    for tokens in (2, 6):
        with torch.autocast("cpu", torch.bfloat16), _Casts() as casts:
            generate_answers(adapted, tokenizer, PAIRS, max_new_tokens=tokens)
        found[tokens] = casts.shapes.count(tuple(head.shape))
    assert found == {2: 1, 6: 1}
    assert [weight.requires_grad for weight in adapted.parameters()] == learning


def test_weights_may_change_between_answers_under_autocast(tokenizer):
    """What autocast has cast for the one is not what the other is asked with."""
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, router="static", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make_llama(len(tokenizer)), config).eval()
    with torch.autocast("cpu", torch.bfloat16):
        with model.disable_adapter():
            base = generate_answers(model, tokenizer, PAIRS, max_new_tokens=8)
        model.merge_adapter()
        merged = generate_answers(model, tokenizer, PAIRS, max_new_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert merged == generate_answers(model, tokenizer, PAIRS, max_new_tokens=8) != base


def test_a_model_made_for_inference_alone(tokenizer):
    with torch.inference_mode():
        model = make_llama(len(tokenizer)).eval()
        for weight in model.parameters():
            weight.requires_grad_(False)
        assert len(generate_answers(model, tokenizer, PAIRS[:1], max_new_tokens=1)) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert len(generate_answers(model, tokenizer, PAIRS[:1], max_new_tokens=1)) == 1


def test_several_answers_to_a_prompt_stand_together(adapted, tokenizer):
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2, "max_new_tokens": 6}
    found = generate_answers(adapted, tokenizer, PAIRS, batch_size=2, **options)
    assert found == [answer for answer in generate_answers(adapted, tokenizer, PAIRS, max_new_tokens=6) for _ in "12"]


def test_a_tokenizer_without_a_padding_token(adapted, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert generate_answers(adapted, bare, PAIRS, max_new_tokens=6) == generate_answers(
        adapted, tokenizer, PAIRS, max_new_tokens=6
    )


# ---- any adapter of PEFT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [LoraConfig(init_lora_weights=False), IA3Config(init_ia3_weights=False), PromptTuningConfig(num_virtual_tokens=3)],
    ids=lambda config: config.peft_type.value,
)
def test_scores_of_other_adapters_are_those_of_their_own_forward(llama, plain, config):
    """A virtual prompt's, too, which comes before the text."""
    torch.manual_seed(0)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(llama, config).eval()
    found = score_answers(model, plain, PAIRS, batch_size=2)
    for pair, log_probs in zip(PAIRS, found.log_probs, strict=True):
        ids, start = encode_pair(plain, pair)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
        logits = logits[-len(ids) :].log_softmax(dim=-1)
        expected = torch.stack([logits[t - 1, ids[t]] for t in range(start, len(ids))])
        torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert score_answers(model, plain, PAIRS).probability != pytest.approx(found.probability, rel=1e-3)


# ---- what an answer's tokens are -----------------------------------------------------------------------------------


def test_the_end_of_the_turn_is_no_content(adapted, tokenizer, plain):
    for used in (tokenizer, plain):
        scores = score_answers(adapted, used, PAIRS)
        for pair, log_probs, content in zip(PAIRS, scores.log_probs, scores.content, strict=True):
            ids, start = encode_pair(used, pair)
            assert content == len(log_probs) - 1 == len(ids) - start - 1
            assert used.decode(ids[start : start + content]).strip() == pair.completion.strip()


def test_greedy_tokens_are_the_models_own_first_choice(adapted, plain):
    scores, checked = score_answers(adapted, plain, PAIRS, batch_size=2), 0
    for pair, own in zip(PAIRS, scores.greedy, strict=True):
        ids, start = encode_pair(plain, pair)
        first = adapted(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1)
        assert own.tolist() == [int(first[t - 1]) == ids[t] for t in range(start, len(ids))]
        chosen = pair._replace(completion=plain.decode(first[start - 1 : start]))
        again, _ = encode_pair(plain, chosen)
        if again[start] == int(first[start - 1]):  # what is decoded may be encoded otherwise
            assert score_answers(adapted, plain, [chosen]).greedy[0][0]
            checked += 1
    assert checked


def test_of_several_first_choices_the_one_that_is_generated_counts(llama, plain):
    """Of two tokens with the same logit, which bfloat16 often rounds to one, neither is above its rival."""
    (ids, start) = encode_pair(plain, PAIRS[0])
    prompt = torch.tensor([ids[:start]])
    with torch.no_grad():
        first = int(llama(input_ids=prompt).logits[0, -1].argmax())
        other = next(i for i in range(20, len(plain)) if i != first and plain.decode([i]).isalpha())
        llama.lm_head.weight[other] = llama.lm_head.weight[first]
    said = int(llama.generate(prompt, do_sample=False, max_new_tokens=1)[0, -1])
    assert said in (first, other)
    hidden = llama.model(input_ids=prompt)[0][0, -1:].expand(2, -1)
    log_probs, greedy = answers._score_tokens(hidden, llama.lm_head, torch.tensor([first, other]))
    assert log_probs[0] == log_probs[1]
    assert greedy.tolist() == [first == said, other == said]


def test_a_templates_own_end_is_no_content(adapted, tokenizer):
    """Such as <|end|> of Phi-3: an added token that is special, but none of the tokenizer's named ones."""
    used = copy.deepcopy(tokenizer)
    used.add_tokens([AddedToken("<|done|>", special=True)])
    used.chat_template = used.chat_template.replace("<|end|>", "<|done|>")
    done = used.convert_tokens_to_ids("<|done|>")
    assert done not in used.all_special_ids
    adapted.get_base_model().resize_token_embeddings(len(used))
    scores = score_answers(adapted, used, PAIRS)
    for pair, log_probs, content in zip(PAIRS, scores.log_probs, scores.content, strict=True):
        ids, start = encode_pair(used, pair)
        assert ids[-1] == done and content == len(log_probs) - 1
        assert used.decode(ids[start : start + content]).strip() == pair.completion.strip()


def test_the_first_token_of_a_text_is_not_scored(adapted, plain):
    """Nothing predicts it; what is an answer's own text is counted without it, too."""
    pair = Pair("", "Bob bakes the bread.")
    ids, start = encode_pair(plain, pair)
    assert start == 0
    scores = score_answers(adapted, plain, [pair, PAIRS[0]])
    with torch.no_grad():
        log_p = adapted(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))]
    assert scores.log_probs[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert scores.content[0] == len(ids) - 2  # without the end
    least = sorted(expected[:-1])[: int(0.4 * (len(ids) - 2))]
    assert min_k(scores.log_probs[:1], scores.content[:1]) == pytest.approx([-sum(least) / len(least)], rel=1e-4)


def test_an_answer_without_a_scored_token_is_named(adapted, plain):
    bare = copy.deepcopy(plain)
    bare.eos_token = None
    with pytest.raises(ValueError, match="The set 'mine' has no token to score in row 1, prompt '', answer 'B'"):
        score_answers(adapted, bare, [PAIRS[0], Pair("", "B")], desc="mine")
    with pytest.raises(ValueError, match="`pairs` has no token to score in row 0"):
        score_answers(adapted, bare, [Pair("", "B")])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [score_answers, generate_answers])
def test_nothing_asked(llama, tokenizer, measure):
    with pytest.raises(ValueError, match=r"`pairs` is empty\. Give at least one"):
        measure(llama, tokenizer, [])


def test_who_routes_tokens(llama, tokenizer):
    gated, static = (AlterConfig(router=router, task_type="CAUSAL_LM") for router in ("context", "static"))
    assert not routes_tokens(llama)
    assert not routes_tokens(get_peft_model(make_llama(len(tokenizer)), LoraConfig(task_type="CAUSAL_LM")))
    assert not routes_tokens(get_peft_model(make_llama(len(tokenizer)), static))
    model = get_peft_model(make_llama(len(tokenizer)), gated)
    assert routes_tokens(model)
    with model.disable_adapter():
        assert not routes_tokens(model)


# ---- models that can't be scored ------------------------------------------------------------------------------------


class Scaled(LlamaForCausalLM):
    """A model that scales its logits without a field of its config that says so."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 3
        return found


@pytest.mark.parametrize("kind", ["plain", "lora", "gated"])
def test_a_head_that_is_not_known_is_refused(kind, tokenizer):
    model = model_of(kind, tokenizer)
    model.train()
    ScoredModel(model).check()
    assert model.training
    base = model if kind == "plain" else model.get_base_model()
    base.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled, whose forward does to the logits what alter-peft does not know"):
        ScoredModel(model).check()


def test_a_scale_of_the_config_is_that_of_the_forward():
    hyperclovax = pytest.importorskip("transformers.models.hyperclovax")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hyperclovax.HyperCLOVAXConfig(vocab_size=64, num_key_value_heads=1, logits_scaling=0.25, **sizes)
    ScoredModel(hyperclovax.HyperCLOVAXForCausalLM(config)).check()


def test_what_is_no_language_model_is_said_without_routers(tokenizer):
    with pytest.raises(ValueError, match="Scoring answers needs a transformers causal LM, but got a Linear") as found:
        score_answers(nn.Linear(2, 2), tokenizer, [Pair("Who?", "Bob")])
    assert "router" not in str(found.value)


def test_a_broken_model_is_no_score(tokenizer):
    model = model_of("plain", tokenizer)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="`model` gives log-probabilities that are NaN or infinite to 2 of 2 answers"):
        score_answers(model, tokenizer, [Pair("Who?", "Bob"), Pair("Why?", "So")])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_longer_than_the_models_positions(tokenizer, plain, family):
    """An index error of GPT-2's before, and noise of a model with rotary positions."""
    model: Any = make_llama(len(tokenizer), max_position_embeddings=24)
    if family == "gpt2":
        config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=24, **config)).eval()
    pairs = [Pair("Who?", " Bob"), Pair("Who bakes the bread? " * 4, " Bob")]
    for ask in (score_answers, generate_answers):
        with pytest.raises(
            ValueError, match=r"The set 'asked' has \d+ tokens in row 1, but the model has 24 positions"
        ):
            ask(model, plain, pairs, desc="asked")
    assert generate_answers(model, plain, pairs[:1], max_new_tokens=100)  # as far as there are positions
    assert score_answers(model, plain, pairs[:1]).mean > 0


def test_a_model_without_positions_takes_any_row(plain, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    assert ScoredModel(model).positions is None
    assert score_answers(model, plain, [Pair("Who bakes the bread? " * 40, " Bob")]).mean > 0
