# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from questions import ANSWERS, ROWS, save

from alter_peft import AlterConfig
from alter_peft.evaluation import Scores, measure_task, read_choices, standard_error


def evaluate_choices(model, tokenizer, tasks, limit=None, batch_size=None, form="letters") -> Scores:
    return measure_task(model, tokenizer, read_choices(tasks, limit, form), batch_size=batch_size)


PROMPTS = {
    "letters": [
        "Who bakes the bread?\nA. Bob\nB. Alice and the bees\nC. The sky\nD. Falcon\nAnswer:",
        "What do bees make?\nA. rye bread\nB. honey\nC. seven million\nAnswer:",
        "The following are multiple choice questions (with answers) about the sky.\n\n"
        "What colour is the sky?\nA. old\nB. blue\nAnswer:",
        "Where does Alice live, near the old bridge?\nA. in Paris\nB. in a budget\nAnswer:",
        "What is the budget?\nA. seven\nB. near\nC. honey every morning\nAnswer:",
    ],
    "texts": [f"Question: {row['question']}\nAnswer:" for row in ROWS],
}


@pytest.fixture
def file(tmp_path) -> str:
    return save(tmp_path / "bakery.jsonl", ROWS)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks, options, message",
    [
        ([], {}, r"`tasks` is \[\], but must be a list"),
        ("mmlu", {}, "`tasks` is 'mmlu', but must be a list"),
        (["none.jsonl"], {}, "no file of questions at 'none.jsonl'"),
        (["a/q.jsonl", "b/q.json"], {}, "two of which have the same name"),
        (["mmlu"], {"form": "cloze"}, r"`form` is 'cloze', but must be one of \['letters', 'texts'\]"),
        (["mmlu"], {"limit": 0}, "`limit` is 0, but must be 1 or more"),
    ],
)
def test_what_cannot_be_evaluated(llama, tokenizer, tasks, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_choices(llama, tokenizer, tasks, **options)


def test_a_batch_has_a_row(llama, tokenizer, file):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="`batch_size` is 0, but must be 1 or more"):
        evaluate_choices(llama, tokenizer, [file], batch_size=0)


def test_what_can_be_said_without_a_model(file, tmp_path):
    assert list(read_choices([file]).tasks) == ["bakery"]
    with pytest.raises(ValueError, match=r"`tasks` has '.*q.jsonl', but it cannot be asked. Row 0 of .* no column"):
        read_choices([save(tmp_path / "q.jsonl", [{"question": "Who?"}])])


def test_without_the_harness(llama, tokenizer, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness.*`pip install alter-peft\[eval\]`"):
        evaluate_choices(llama, tokenizer, [file])


# ---- through the harness --------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the harness asked and was answered: task -> a list a question of (prompt, continuation, ln p)."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    seen: dict[str, list] = {}
    evaluate = evaluator.evaluate

    def spy(**arguments):
        found = evaluate(**arguments)
        for task, samples in found["samples"].items():
            seen[task] = [
                [(*pair, score[0]) for pair, score in zip(row["arguments"], row["filtered_resps"], strict=True)]
                for row in samples
            ]
        return found

    monkeypatch.setattr(evaluator, "evaluate", spy)
    return seen


def gated(base):
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".alter_B." in name:
                parameter.mul_(5)
    return model


def lora(base):
    return get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()


MODELS = {"plain": lambda base: base, "alter": gated, "lora": lora}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_that_an_adapter_keeps(tokenizer, file, asked):
    base = make_llama(len(tokenizer), tie_word_embeddings=True)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    before = log_likelihood(model, tokenizer, "Who bakes?", " Bob")
    evaluate_choices(model, tokenizer, [file])
    assert log_likelihood(model, tokenizer, "Who bakes?", " Bob") == before
    assert "tie_weights" not in vars(model)


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, continuation: str) -> float:
    """Token after token, from all logits of one row."""
    ids, start = tokenizer(prompt + continuation)["input_ids"], len(tokenizer(prompt)["input_ids"])
    log_p = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("form", ["letters", "texts"])
def test_scores_are_those_of_a_loop_by_hand(tokenizer, file, asked, kind, form):
    """One question at a time, or several of different lengths at once."""
    model = MODELS[kind](make_llama(len(tokenizer)))
    right, right_by_length = [], []
    expected = []
    for row, prompt, answer in zip(ROWS, PROMPTS[form], ANSWERS, strict=True):
        texts = row["choices"] if form == "texts" else "ABCD"[: len(row["choices"])]
        found = [log_likelihood(model, tokenizer, prompt, f" {text}") for text in texts]
        expected.append(
            [(prompt, f" {text}", pytest.approx(value, abs=2e-4)) for text, value in zip(texts, found, strict=True)]
        )
        right.append(float(max(range(len(found)), key=found.__getitem__) == answer))
        by_length = [value / len(text) for text, value in zip(texts, found, strict=True)]
        right_by_length.append(float(max(range(len(found)), key=by_length.__getitem__) == answer))
    for batch_size in (1, 4):
        scores = evaluate_choices(model, tokenizer, [file], batch_size=batch_size, form=form)
        assert asked["bakery"] == expected
        assert scores.of("bakery", "acc").rows == right
        assert scores.of("bakery", "acc").value == pytest.approx(sum(right) / 5)
        assert list(map(str, scores)) == ["bakery/acc", "bakery/acc_norm"][: 2 if form == "texts" else 1]
        if form == "texts":
            assert scores.of("bakery", "acc_norm").rows == right_by_length


def test_an_adapter_that_is_switched_off_is_the_base(llama, tokenizer, file, asked):
    evaluate_choices(llama, tokenizer, [file])
    base = asked["bakery"]
    model = gated(llama)
    evaluate_choices(model, tokenizer, [file])
    assert asked["bakery"] != base
    with model.disable_adapter():
        evaluate_choices(model, tokenizer, [file])
    assert asked["bakery"] == base


def test_limited_questions_are_spread_over_a_file(llama, tokenizer, file, asked):
    scores = evaluate_choices(llama, tokenizer, [file], limit=2)
    assert [row[0][0] for row in asked["bakery"]] == [PROMPTS["letters"][0], PROMPTS["letters"][2]]
    assert len(scores.of("bakery", "acc").rows) == 2
    evaluate_choices(llama, tokenizer, [file], limit=3)
    assert [row[0][0] for row in asked["bakery"]][-3:] == [PROMPTS["letters"][row] for row in (0, 1, 3)]
    assert len(evaluate_choices(llama, tokenizer, [file], limit=50).of("bakery", "acc").rows) == 5


def test_several_files_stand_side_by_side(llama, tokenizer, file, tmp_path, asked):
    other = save(tmp_path / "other.json.gz", ROWS[1:3])
    both = evaluate_choices(llama, tokenizer, [other, file])
    assert list(map(str, both)) == ["other/acc", "bakery/acc"]
    assert both == evaluate_choices(llama, tokenizer, [other]) | evaluate_choices(llama, tokenizer, [file])


def test_the_precision_is_that_of_the_context(llama, tokenizer, file, asked):
    with torch.autocast("cpu", torch.bfloat16):
        evaluate_choices(llama, tokenizer, [file])
        scored = [part for row in asked["bakery"] for part in row]
        expected = [log_likelihood(llama, tokenizer, prompt, text) for prompt, text, _ in scored]
    found = [value for *_, value in scored]
    exact = [log_likelihood(llama, tokenizer, prompt, text) for prompt, text, _ in scored]
    assert found == pytest.approx(expected, abs=1e-3)
    assert found != pytest.approx(exact, abs=1e-2)


def test_the_caller_finds_everything_as_it_was(tokenizer, file, asked):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    model = gated(make_llama(len(tokenizer))).train()
    state = torch.get_rng_state()
    evaluate_choices(model, bare, [file])
    assert model.training and bare.pad_token is None
    assert torch.equal(torch.get_rng_state(), state)


def test_standard_error_is_the_harnesss(llama, tokenizer, file, asked):
    mean_stderr = pytest.importorskip("lm_eval.api.metrics").mean_stderr
    score = evaluate_choices(llama, tokenizer, [file]).of("bakery", "acc")
    assert standard_error(score) == pytest.approx(mean_stderr(score.rows))


# ---- tasks of the harness -------------------------------------------------------------------------------------------


@pytest.fixture
def few_tasks(monkeypatch, asked):
    """A manager that reads the files of some tasks alone, and data for them."""
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(tasks.__file__).parent
    paths = [folder / name for name in ("wmdp", "arc", "gsm8k")]
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_path=paths, include_defaults=False))
    wmdp = [
        {**row, "choices": (row["choices"] * 2)[:4], "answer": answer}
        for row, answer in zip(ROWS, ANSWERS, strict=True)
    ]
    arc = [
        {
            "question": row["question"], "answerKey": "ABCD"[answer],
            "choices": {"text": row["choices"], "label": list("ABCD"[: len(row["choices"])])},
        }
        for row, answer in zip(ROWS, ANSWERS, strict=True)
    ]  # fmt: skip
    sizes = {"wmdp-bio": 5, "wmdp-chem": 3, "wmdp-cyber": 2}

    def load_dataset(path, name, **_):
        if path == "cais/wmdp":
            return DatasetDict({"test": Dataset.from_list(wmdp[: sizes[name]])})
        assert path == "allenai/ai2_arc", path
        return DatasetDict(dict.fromkeys(("train", "validation", "test"), Dataset.from_list(arc)))

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    return wmdp


def test_wmdp_is_asked_as_the_harness_asks_it(llama, tokenizer, few_tasks, tmp_path, asked):
    """A local file with the same rows gets the same prompts and so the same accuracy."""
    rows = [{"question": row["question"], "choices": row["choices"], "answer": row["answer"]} for row in few_tasks]
    local = save(tmp_path / "local.jsonl", [{**row, "subject": "biology"} for row in rows])
    scores = evaluate_choices(llama, tokenizer, ["wmdp_bio", local])
    assert asked["wmdp_bio"] == asked["local"]
    assert scores.of("wmdp_bio", "acc") == replace(scores.of("local", "acc"), set="wmdp_bio")
    assert list(map(str, scores)) == ["wmdp_bio/acc", "local/acc"]


def test_arc_is_asked_as_the_harness_asks_it(llama, tokenizer, few_tasks, file, asked):
    scores = evaluate_choices(llama, tokenizer, ["arc_easy", file], form="texts")
    assert asked["arc_easy"] == asked["bakery"]
    assert scores.of("arc_easy", "acc_norm") == replace(scores.of("bakery", "acc_norm"), set="arc_easy")


def test_a_group_has_the_mean_of_its_tasks(llama, tokenizer, few_tasks):
    single = evaluate_choices(llama, tokenizer, ["wmdp_bio", "wmdp_chem", "wmdp_cyber"])
    group = evaluate_choices(llama, tokenizer, ["wmdp"])
    assert list(map(str, group)) == ["wmdp/acc"]
    assert sorted(group.of("wmdp", "acc").rows) == sorted(row for score in single.values() for row in score.rows)
    assert len(group.of("wmdp", "acc").rows) == 10
    assert group.of("wmdp", "acc").value == pytest.approx(sum(group.of("wmdp", "acc").rows) / 10)


def test_a_tag_stands_for_its_tasks(llama, tokenizer, few_tasks):
    scores = evaluate_choices(llama, tokenizer, ["ai2_arc"], limit=3)
    assert set(map(str, scores)) == {
        f"{task}/{metric}" for task in ("arc_easy", "arc_challenge") for metric in ("acc", "acc_norm")
    }
    assert [len(score.rows) for score in scores.values()] == [3] * 4


def test_a_file_with_the_name_of_a_task(llama, tokenizer, few_tasks, tmp_path):
    with pytest.raises(ValueError, match="`tasks` has a file named 'wmdp_bio', as a task of the harness is"):
        evaluate_choices(llama, tokenizer, ["wmdp", save(tmp_path / "wmdp_bio.jsonl", ROWS)])


def test_a_task_that_nobody_knows(llama, tokenizer, few_tasks):
    with pytest.raises(ValueError, match=r"`tasks` has 'wmdp_boi', which is neither .* \(close to it: \['wmdp_bio'"):
        evaluate_choices(llama, tokenizer, ["wmdp_boi"])


def test_a_task_without_choices(llama, tokenizer, few_tasks, monkeypatch):
    rows = Dataset.from_list([{"question": "How many?", "answer": "#### 7"}])
    monkeypatch.setattr(
        "lm_eval.api.task.datasets.load_dataset", lambda *_, **__: DatasetDict({"train": rows, "test": rows})
    )
    with pytest.raises(ValueError, match="`tasks` has 'gsm8k', but 'gsm8k' has no accuracy"):
        evaluate_choices(llama, tokenizer, ["gsm8k"])


def test_a_task_whose_data_is_out_of_reach(llama, tokenizer, few_tasks, monkeypatch):
    def load_dataset(**_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"The data of the task 'wmdp_bio' cannot be loaded \(Couldn't reach the Hub\)"
    ):
        evaluate_choices(llama, tokenizer, ["wmdp_bio"])
