# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
import torch
from adapters import config
from peft import LoraConfig, get_peft_model
from test_page import checked

from alter_peft.chat import chat_or_plain
from alter_peft.entropy import tsallis_entropy
from alter_peft.evaluation import Pair, encode_pair, score_answers
from alter_peft.evaluation.seen_tokens import SeenTokens, observe_texts, observe_tokens
from alter_peft.report.token_page import cloud, token_page


PAIR = Pair("Where does Alice live?", "Alice lives in Paris.")
TEXTS = ["Who bakes the bread? <b>Bob & Anna</b> bake\nit.", PAIR]


@pytest.fixture(params=["none", "base"])
def adapted(llama, request):
    """A random adapter; its router sends what it deems a low-entropy context to any of three experts."""
    torch.manual_seed(1)
    return get_peft_model(llama, config(inference_entropy=request.param)).eval()


@pytest.fixture
def one_way(llama):
    """Every token is sent to the second forget expert."""
    model = get_peft_model(llama, config(domains=["a&b", "recipes"])).eval()
    router = next(module.token_router for module in model.modules() if hasattr(module, "token_router"))
    with torch.no_grad():
        router.alter_router["default"].weight.zero_()
        router.alter_router["default"].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    return model


def test_entropy_is_the_base_models(adapted, tokenizer):
    seen = observe_texts(adapted, tokenizer, TEXTS[:1])
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad(), adapted.disable_adapter():
        expected = tsallis_entropy(adapted(input_ids=ids).logits, 1.5)[0, :-1]
    assert seen[0].entropy == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(seen[0].entropy) > 2 * min(seen[0].entropy)


def test_experts_are_those_of_the_answers(adapted, tokenizer):
    seen = observe_texts(adapted, tokenizer, [PAIR, "Bees make honey."])
    scores = score_answers(adapted, tokenizer, [PAIR])
    assert seen[0].experts[-len(scores.log_probs[0]) :] == scores.experts.tolist()
    assert len(set(seen[0].experts)) > 1  # or the order would not matter


@pytest.mark.parametrize("text", ["Bees make honey.", " é, 蜂蜜 🐝!", "🐝"])
def test_pieces_are_the_text(adapted, tokenizer, text):
    seen = observe_texts(adapted, tokenizer, [text])
    assert "".join(seen[0].pieces) == text
    assert len(seen[0].pieces) == len(tokenizer(text)["input_ids"]) == len(seen[0].entropy) + 1


def test_a_cut_character_is_kept(adapted, tokenizer):
    from alter_peft.evaluation.seen_tokens import _pieces

    ids = tokenizer("ab🐝")["input_ids"][:-1]
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_training_mode_is_left_alone(adapted, tokenizer):
    adapted.train()
    observe_texts(adapted, tokenizer, TEXTS)
    assert adapted.training and all(module.training for module in adapted.modules())


def test_page(one_way, tokenizer):
    html = token_page(observe_tokens(one_way, tokenizer, {"forget": TEXTS}))
    found = checked(html)
    assert not found.loaded and "<b>Bob & Anna</b> bake\nit." in found.text and "Alice lives in Paris." in found.text
    seen = observe_texts(one_way, tokenizer, TEXTS)
    count = sum(len(text.entropy) for text in seen)
    assert html.count(', recipes">') == count and "a&amp;b" in html and ', retain">' not in html
    assert html.count("border-bottom:3px solid #D55E00") == count + 1  # with the legend
    shown = [float(value) for value in re.findall(r'title="S ([0-9.]+),', html)]
    assert shown == pytest.approx([value for text in seen for value in text.entropy], abs=0.006)


def test_examples_are_spread_and_clouds_are_of_all(one_way, tokenizer):
    sets = {name: [f"The {name} number {i}." for i in range(40)] for name in ("forget", "retain", "world_facts")}
    own = one_way.peft_config["default"]
    for experts, rows in {2: (0, 20), 4: (0, 10, 20, 30), 20: range(0, 40, 4)}.items():  # ten at most
        own.num_forget_experts, own.domains = experts, [f"domain {i}" for i in range(experts)]
        html = token_page(observe_tokens(one_way, tokenizer, sets))
        examples = [re.sub("<.*?>", "", text) for text in re.findall(r"<b>.*</p>", html)]
        expected = [f"forget The forget number {i}." for i in rows]
        expected += [f"{name} The {name} number {i}." for name in ("retain", "world_facts") for i in (0, 20)]
        assert examples == expected and "forget (40), retain (40), world_facts (40)" in html
    seen = observe_texts(one_way, tokenizer, [text for texts in sets.values() for text in texts])
    words = sum(bool(re.search(r"[^\W_]", piece)) for text in seen for piece in text.pieces[1:])
    assert sum(map(int, re.findall(r"tokens(?: \(.*?\))?: (\d+)</h4>", html))) == words


def test_clouds_are_split_at_the_threshold(one_way, tokenizer):
    seen = observe_texts(one_way, tokenizer, TEXTS)
    values = sorted(value for text in seen for value in text.entropy)
    start = encode_pair(tokenizer, PAIR)[1]
    assert "".join(seen[1].pieces[start:]) == "Alice lives in Paris.<|end|>"
    words = [
        (piece, value)
        for text, first in zip(seen, (1, start), strict=True)
        for piece, value in list(zip(text.pieces[1:], text.entropy, strict=True))[first - 1 :]
        if re.search(r"\w", piece) and "<|" not in piece
    ]
    for threshold in (values[len(values) // 2], 0.0, 10.0):
        one_way.peft_config["default"].entropy_threshold = threshold
        html = token_page(observe_tokens(one_way, tokenizer, {"mine": TEXTS}))
        high = sum(value > threshold for _, value in words)
        assert f": {high}</h4>" in html and f"Low-entropy tokens: {len(words) - high}</h4>" in html
        assert html.count("<p>none</p>") == (threshold in (0.0, 10.0))


def test_a_pair_without_a_prompt_has_a_page(one_way, tokenizer):
    """Nothing predicts its first token, which is not scored either."""
    plain = chat_or_plain(tokenizer, False)
    html = token_page(observe_tokens(one_way, plain, {"mine": [Pair("", "Alice lives in Paris.")]}))
    scored = len(score_answers(one_way, plain, [Pair("", "Alice lives in Paris.")]).log_probs[0])
    assert html.count(', recipes">') == scored and "Alice lives in Paris." in checked(html).text


@pytest.mark.parametrize(
    ("text", "what"), [("", "''"), ("A", "'A'"), (Pair("", ""), "prompt '', answer ''")], ids=["empty", "one", "pair"]
)
def test_a_text_without_a_token_to_score_is_named(one_way, tokenizer, text, what):
    plain = chat_or_plain(tokenizer, False)
    with pytest.raises(ValueError, match=f"The set 'mine' has no token to score in row 1, {what}: nothing predicts"):
        token_page(observe_tokens(one_way, plain, {"mine": ["Bees make honey.", text]}))
    with pytest.raises(ValueError, match=f"`texts` has no token to score in row 0, {what}: nothing predicts"):
        observe_texts(one_way, plain, [text])


def test_cloud_has_sizes_by_count():
    found = [(word, count, round(size, 2)) for word, count, size in cloud({"often": 9, "<rare>": 1, "some": 4})]
    assert found == [("<rare>", 1, 1.07), ("often", 9, 2.2), ("some", 4, 1.63)]
    assert len(cloud({f"word{i}": 1 for i in range(100)})) == 40


def test_what_was_seen_comes_back(one_way, tokenizer, tmp_path):
    seen = observe_tokens(one_way, tokenizer, {"mine": TEXTS})
    seen.save(tmp_path / "tokens.json")
    assert SeenTokens.load(tmp_path / "tokens.json") == seen


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("plain", "`model` is a LlamaForCausalLM without an ALTER adapter"),
        ("lora", "`model` is a PeftModelForCausalLM without an ALTER adapter"),
        ("static", "no active adapter that routes tokens"),
        ("disabled", "no active adapter that routes tokens"),
        ("unmeasured", "`entropy_threshold` of adapter 'default' is not known yet"),
        ("no texts", "`sets` has no texts in \\['none'\\]"),
    ],
)
def test_what_has_no_page(llama, tokenizer, case, message):
    configs = {
        "lora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "static": config(router="static"),
        "unmeasured": config(entropy_threshold=None, entropy_quantile=0.5),
    }
    model = llama if case == "plain" else get_peft_model(llama, configs.get(case, config()))
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=message):
        token_page(
            observe_tokens(model, tokenizer, {"mine": TEXTS, "none": []} if case == "no texts" else {"mine": TEXTS})
        )
