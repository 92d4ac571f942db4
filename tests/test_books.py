# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import re
from statistics import mean

import pytest
import torch
from conftest import make_llama
from peft import get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from test_book_data import books  # noqa: F401
from transformers import PreTrainedTokenizerFast

from alter_peft import AlterConfig
from alter_peft.evaluation import (
    TASKS,
    Key,
    ModelOnSet,
    Score,
    Scores,
    compare_books,
    generate_answers,
    measure_guards,
    measure_task,
    read_books,
)
from alter_peft.evaluation.metrics.membership import above_holdout
from alter_peft.evaluation.metrics.text import KNOWMEM_TOKENS, bleu, rouge_l


sacrebleu = pytest.importorskip("sacrebleu")

QUESTIONS = [("Who bakes the bread?", "Bob"), ("Where does Alice live?", "In Paris"), ("What do bees make?", "Honey")]


@pytest.fixture
def plain(tokenizer) -> PreTrainedTokenizerFast:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.fixture
def data(tokenizer, books, tmp_path):  # noqa: F811
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(f'{{"question": "{question}", "answer": "{answer}"}}' for question, answer in QUESTIONS))
    return read_books(
        tokenizer, books["hyde"], [books["holmes"]], length=20, passages=4, forget_questions=path, shots=path
    )


@pytest.fixture
def adapted(llama):
    torch.manual_seed(1)
    # a random hidden layer, or gates that are nearly even, would make other answers by the rounding of other batches
    options = {"router_layer": 2, "router_hidden_size": 0}
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(llama, config).eval()


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_bleu_is_the_mean_of_sacrebleus():
    answers = ["The sky is blue and wide today", "", "The sky is blue", "bread bread bread bread bread"]
    references = ["The sky is blue and wide today", "The sky", "The sky is very blue indeed", "Bob bakes the bread"]
    expected = [sacrebleu.corpus_bleu([a], [[r]]).score / 100 for a, r in zip(answers, references, strict=True)]
    assert bleu(answers, references) == pytest.approx(expected)
    assert expected[:2] == pytest.approx([1, 0]) and 0 < expected[2] < 1


def test_rouge_may_leave_words_as_they_stand():
    answer, reference = ["He was baking breads all day"], ["He bakes bread"]
    assert rouge_l(answer, reference) == [1.0]
    assert rouge_l(answer, reference, "fmeasure", use_stemmer=False) == pytest.approx([2 * (1 / 6) * (1 / 3) / 0.5])
    assert rouge_l(answer, reference, "precision") == [0.5]
    with pytest.raises(ValueError, match="`kind` is 'f1', but must be one of"):
        rouge_l(answer, reference, "f1")


# ---- evaluate_books -------------------------------------------------------------------------------------------------


@torch.no_grad()
def continued(model, tokenizer, passage, tokens: int) -> str:
    """Greedily, one token after the other, without a cache."""
    ids = tokenizer(passage.prompt)["input_ids"]
    answer: list[int] = []
    while len(answer) < tokens and tokenizer.eos_token_id not in answer:
        answer.append(int(model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


@torch.no_grad()
def least_likely(model, tokenizer, passage) -> float:
    """Min-40% of all tokens after the first word, from all logits of one row."""
    text = passage.prompt + passage.completion
    ids, first = tokenizer(text)["input_ids"], len(tokenizer(re.match(r"\s*\S+", text)[0])["input_ids"])
    log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = sorted(log_p[t - 1, ids[t]].item() for t in range(first, len(ids)))
    least = found[: int(0.4 * len(found))]
    return -sum(least) / len(least)


def fmeasure(answer: str, reference: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure


def test_scores_are_those_of_a_loop_by_hand(adapted, tokenizer, plain, data, monkeypatch):
    """And the chat template of a tokenizer is left aside."""
    monkeypatch.setattr("alter_peft.evaluation.metrics.text.VERBMEM_TOKENS", 9)
    scores = measure_task(adapted, tokenizer, data, batch_size=3)
    assert tokenizer.chat_template
    for name, passages in (("forget", data.forget), ("retain", data.retain)):
        said = [continued(adapted, plain, passage, 20) for passage in passages]
        truth = [passage.completion for passage in passages]
        assert len(set(said)) > 1
        assert scores.of(name, "rouge_f").rows == pytest.approx(
            [fmeasure(*both) for both in zip(said, truth, strict=True)]
        )
        assert scores.of(name, "bleu").rows == pytest.approx(bleu(said, truth))
        begun = [[plain.decode(plain(text)["input_ids"][:9]) for text in texts] for texts in (said, truth)]
        expected = [fmeasure(*both) for both in zip(*begun, strict=True)]
        assert scores.of(name, "verbmem").rows == pytest.approx(expected)
    for name, passages in (("forget", data.forget), ("retain", data.retain), ("holdout", data.holdout)):
        expected = [least_likely(adapted, plain, passage) for passage in passages]
        assert scores.of(name, "min_k").rows == pytest.approx(expected, rel=1e-4)
    auc = mean(above_holdout(*(scores.of(name, "min_k").rows for name in ("forget", "holdout"))))
    assert scores.of("forget", "membership_auc").value == auc
    assert all(
        score.value == pytest.approx(sum(score.rows) / len(score.rows)) for score in scores.values() if score.rows
    )
    assert Key("retain", "knowmem") not in scores
    about = {"books": ["hyde.txt", "holmes.txt"], "length": 20, "passages": 4}
    alike = {"as_chat": False, "bf16": False, **about}
    assert scores.of("forget", "rouge_f").settings == {
        **alike, "is_forget": True, "answered": len(data.forget), "max_new_tokens": 20
    }  # fmt: skip
    assert scores.of("holdout", "min_k").settings == {**alike, "is_forget": False}


def test_answers_end_where_the_model_asks_on(llama, tokenizer, plain, data, monkeypatch):
    said = ["Bob\n\nQuestion: Where?", "in Paris\nQuestion: Who?", "wax"]
    asked = []

    def generate(model, used, pairs, batch_size, max_new_tokens, desc=None):
        asked.append(max_new_tokens)
        if max_new_tokens != KNOWMEM_TOKENS:
            return generate_answers(model, used, pairs, batch_size, max_new_tokens)
        assert [pair.prompt.endswith("\nAnswer: ") for pair in pairs] == [True] * 3
        return said

    monkeypatch.setattr("alter_peft.evaluation.model_on_set.generate_answers", generate)
    scores = measure_task(llama, tokenizer, data)
    assert asked == [20, 20, 32]
    assert scores.of("forget", "knowmem").value == pytest.approx(2 / 3)
    assert scores.of("forget", "knowmem").rows == [1, 1, 0]


def test_guards_are_of_the_continued_passages(adapted, llama, tokenizer, plain, data):
    alone = measure_task(adapted, tokenizer, data, answered=2)
    found = measure_task(adapted, tokenizer, data, answered=2, judge=llama, guards=True)
    assert {key: found[key] for key in alone} == alone
    for name, passages in (("forget", data.forget), ("retain", data.retain)):
        asked = ModelOnSet(adapted, plain, name, passages, name == "forget", 2, data.length, judge=llama)
        guards = Scores(measure_guards(asked))
        assert Key(name, "astray") in guards and len(guards.of(name, "unique_tokens").rows) == 2
        for key, score in guards.items():
            assert found[key].rows == pytest.approx(score.rows, rel=1e-4), key
    assert not any(key.metric == "fluency" for key in alone)


def test_some_passages_may_be_continued(llama, tokenizer, data):
    every, some = measure_task(llama, tokenizer, data), measure_task(llama, tokenizer, data, answered=2)
    for metric in ("verbmem", "rouge_f", "bleu"):
        assert some.of("forget", metric).rows == every.of("forget", metric).rows[::2]
    for key in (Key("forget", "min_k"), Key("holdout", "min_k"), Key("forget", "exact_memorization")):
        assert some[key].rows == pytest.approx(every[key].rows)


def test_a_book_learned_by_heart_is_found_out(tokenizer, plain, data):
    model = make_llama(len(tokenizer)).train()
    texts = [passage.prompt + passage.completion + plain.eos_token for passage in data.forget]
    batch = plain(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    scores, oracle = (measure_task(m.eval(), tokenizer, data) for m in (model, make_llama(len(tokenizer))))
    for metric in ("verbmem", "rouge_f", "bleu", "exact_memorization"):
        assert scores.of("forget", metric).value > 0.9 > 0.5 > oracle.of("forget", metric).value, metric
    assert scores.of("forget", "membership_auc").value == 0 < oracle.of("forget", "membership_auc").value
    compared = Scores(compare_books(scores, [oracle]))
    assert {key.metric for key in compared} | {"membership_auc"} == set(TASKS["books"].metrics)
    assert compared.of("forget", "privleak").value == -100
    assert compared.of("forget", "similarity_gap").value > 0.5


# ---- compare_books --------------------------------------------------------------------------------------------------


def scores_of(rouge: float, bleu: float, auc: float) -> Scores:
    named = {"rouge_f": rouge, "bleu": bleu, "membership_auc": auc}
    return Scores(Score("forget", name, value) for name, value in named.items())


def test_the_gap_counts_both_sides():
    oracles = [scores_of(0.2, 0.1, 0.4), scores_of(0.4, 0.1, 0.6)]  # .3, .1, .5
    for scores, gap, leak in ((scores_of(0.5, 0.1, 0.25), 0.1, -50), (scores_of(0.1, 0.3, 0.75), 0.2, 50)):
        found = compare_books(scores, oracles)
        assert [score.key for score in found] == [Key("forget", "similarity_gap"), Key("forget", "privleak")]
        assert [score.value for score in found] == pytest.approx([gap, leak])
    assert [score.value for score in compare_books(oracles[0], [oracles[0]])] == [0, 0]


def test_nothing_to_compare_with():
    with pytest.raises(ValueError, match="`oracles` is empty: give the scores of at least one"):
        compare_books(scores_of(0, 0, 0), [])
    with pytest.raises(ValueError, match="The score 'forget/bleu' is missing"):
        compare_books(scores_of(0, 0, 0), [Scores([Score("forget", "rouge_f", 0)])])
