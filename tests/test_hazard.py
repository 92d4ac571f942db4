# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from peft import get_peft_model

from alter_peft import AlterConfig
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.grid import Grid
from alter_peft.benchmark.setting import read_setting
from alter_peft.evaluation import measure_task, read_hazard, score_answers
from alter_peft.evaluation.arguments import EvaluateArguments
from alter_peft.evaluation.scores import Key
from alter_peft.evaluation.tasks.hazard import ASKED, PASSAGES, SHIPPED
from alter_peft.words import words


pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[1]
TEXTS = {
    "forget": ["Alice lives in Paris, near the old bridge.", "The budget of project Falcon is seven million."],
    "retain": ["Bob bakes the bread with rye and honey.", "Every morning Bob bakes the bread."],
    "bystanders": ["The sky is blue, and bees make honey."],
    "calibration": ["Near the old bridge the sky is rye."],
    "holdout": ["Honey lives in the budget of Paris.", "Seven bees make the old bread."],
}
QUESTION = {"question": "Who bakes the bread?", "choices": ["Bob", "Alice", "The sky", "Falcon"], "answer": 0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A hazard of one's own."""
    place = tmp_path / "bakery"
    place.mkdir()
    for name, texts in TEXTS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ASKED:
        (place / f"{name}_questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return place


def shipped(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- what comes with the package ------------------------------------------------------------------------------------


def test_the_shipped_hazard_is_read():
    data = read_hazard()
    counts = {name: len(getattr(data, name)) for name in PASSAGES}
    assert counts == {"forget": 124, "retain": 64, "bystanders": 30, "calibration": 20, "holdout": 20}
    for name in PASSAGES:
        texts = [row["text"] for row in shipped(name)]
        assert [passage.prompt + passage.completion for passage in getattr(data, name)] == texts
        assert all(46 <= len(text.split()) <= 92 and text.isascii() for text in texts)
    assert [len(shipped(f"{name}_questions")) for name in ASKED] == [60, 40, 20]
    assert data.settings == {"hazard": "shipped"} and data.as_chat is False


def test_no_passage_and_no_question_is_in_two_sets():
    """Nor a sentence of eight words or more, and no question stands in a passage."""
    texts = {name: [row["text"] for row in shipped(name)] for name in PASSAGES}
    for one, other in combinations(PASSAGES, 2):
        eights = [
            {tuple(found[i : i + 8]) for text in texts[name] for found in [words(text)] for i in range(len(found) - 7)}
            for name in (one, other)
        ]
        assert not eights[0] & eights[1], (one, other)
    asked = [row["question"] for name in ASKED for row in shipped(f"{name}_questions")]
    assert len(set(asked)) == len(asked)
    said = " ".join(" ".join(words(text)) for name in PASSAGES for text in texts[name])
    assert not [question for question in asked if " ".join(words(question)) in said]


@pytest.mark.parametrize("name", ASKED)
def test_questions_give_nothing_away(name):
    """Four choices, each place right as often, the right one as long as the others, and said in the passages."""
    rows = shipped(f"{name}_questions")
    places = Counter(row["answer"] for row in rows)
    assert all(len(set(row["choices"])) == 4 for row in rows) and set(places.values()) == {len(rows) // 4}
    right = [row["choices"][row["answer"]] for row in rows]
    wrong = [choice for row in rows for i, choice in enumerate(row["choices"]) if i != row["answer"]]
    lengths = [sum(map(len, choices)) / len(choices) for choices in (right, wrong)]
    assert abs(lengths[0] - lengths[1]) < 1
    longest = sum(len(row["choices"][row["answer"]]) > sorted(map(len, row["choices"]))[-2] for row in rows)
    assert longest <= len(rows) / 4
    text = " ".join(row["text"] for row in shipped(name)).lower()
    key_words = [max(words(choice), key=len) for choice in right]
    assert sum(word in text for word in key_words) == len(key_words)


def test_the_package_holds_the_data():
    """All files lie where pyproject.toml says that a wheel takes them from."""
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    place = ROOT / "alter_peft/evaluation/tasks"
    taken = {path for one in globs["alter_peft.evaluation.tasks"] for path in place.glob(one)}
    names = {*(f"{name}.jsonl" for name in PASSAGES), *(f"{name}_questions.jsonl" for name in ASKED), "README.md"}
    assert {path.name for path in taken if path.parent.name == "hazard"} == names


# ---- a hazard of one's own ------------------------------------------------------------------------------------------


def test_passages_are_taught_whole_and_asked_for_by_halves(folder):
    data = read_hazard(folder)
    assert data.training_rows(data.forget)["text"] == TEXTS["forget"]
    assert data.forget[0][:2] == ("Alice lives in Paris,", " near the old bridge.")
    assert data.settings == {"hazard": "bakery"}
    args = BenchmarkArguments(model="m", output_dir=str(folder / "out"), task_data={"hazard": {"folder": str(folder)}})
    setting = read_setting(args, None)
    assert setting.taught["text"] == [*TEXTS["forget"], *TEXTS["retain"], *TEXTS["bystanders"]]
    assert setting.taught_to_oracles["text"] == [*TEXTS["retain"], *TEXTS["bystanders"]]
    given = (setting.given.forget, setting.given.retain, setting.given.calibration)
    assert [rows["text"] for rows in given] == [TEXTS[name] for name in ("forget", "retain", "calibration")]
    assert setting.given.as_chat is False


def test_scores_are_of_plain_text_whatever_the_template(llama, tokenizer, folder):
    torch.manual_seed(1)
    model = get_peft_model(llama, AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")).eval()
    data = read_hazard(folder)
    scores = measure_task(model, tokenizer, data, max_new_tokens=4, judge=llama, guards=True)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for name in ("forget", "retain", "bystanders", "holdout"):
        assert {Key(name, metric) for metric in ("exact_memorization", "extraction_strength", "min_k")} <= set(scores)
        expected = score_answers(model, plain, getattr(data, name)).probability
        assert scores.of(name, "probability").rows == pytest.approx(expected)
    for name in ASKED:
        assert {Key(name, "rouge"), Key(name, "astray")} <= set(scores)
        assert scores.of(f"{name}_questions", "acc").settings["form"] == "texts"


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("holdout.jsonl", None, "`folder` is .*bakery', which has no 'holdout.jsonl'. It needs forget.jsonl, "),
        ("retain_questions.jsonl", None, "which has no 'retain_questions.jsonl'"),
        (
            "retain.jsonl",
            json.dumps({"text": TEXTS["forget"][0]}),
            r"`retain.jsonl` has .* is in `forget.jsonl` already",
        ),
        ("retain.jsonl", '{"text": "Bread"}', "`retain.jsonl` has 'Bread' .number 0., but a passage needs two words"),
        (
            "retain.jsonl",
            '{"prompt": "Who?", "completion": "Bob"}',
            "`retain.jsonl` has the columns .*, but must have pas",
        ),
        ("forget_questions.jsonl", '{"question": "Who?"}', "has no column 'choices'"),
    ],
)
def test_what_is_no_hazard(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_hazard(folder)


# ---- the flag -------------------------------------------------------------------------------------------------------


def test_the_flag_stands_for_the_task(tmp_path):
    common = {"model": "m", "output_dir": str(tmp_path / "out")}
    flag, task = BenchmarkArguments(**common, hazard=True), BenchmarkArguments(**common, task_data={"hazard": {}})
    assert flag.task == task.task == ("hazard", {}) and flag.settings == task.settings
    with pytest.raises(ValueError, match="`rows` is set, but it is of TOFU alone\\. Remove it or `hazard`"):
        BenchmarkArguments(**common, hazard=True, rows=3)
    with pytest.raises(ValueError, match="a grid is of one task\\. Give one, and no `books`"):
        BenchmarkArguments(**common, hazard=True, books={"forget": "a.txt"})
    assert EvaluateArguments(model="m", output_file=str(tmp_path / "x.json"), hazard=True).task_options == {
        "hazard": {}
    }


def test_a_grid(tokenizer, folder, tmp_path, monkeypatch):
    """Target, oracles and a method are taught, unlearned, asked and attacked."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quick = {"max_steps": 1, "disable_tqdm": True}
    args = BenchmarkArguments(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), task_data={"hazard": {"folder": str(folder)}},
        methods=["lora_ihl"], oracle_seeds=[0, 1], max_new_tokens=3, attacks=["membership", "asking_otherwise"],
        options={"teach": quick, "lora_ihl": quick},
    )  # fmt: skip
    results = Grid(args).run()
    assert [(one.name, one.error) for one in results] == [
        ("target", None), ("oracle", None), ("oracle", None), ("lora_ihl", None)
    ]  # fmt: skip
    for one in results:
        assert {Key(f"{name}_questions", "acc") for name in ASKED} <= set(one.scores)
        assert any(key.attack == "asking_otherwise" for key in one.scores)
