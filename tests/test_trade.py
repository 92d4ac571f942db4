# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from peft import get_peft_model

from alter_peft import AlterConfig
from alter_peft.evaluation import Key, Pair, Score, Scores, generate_answers, score_answers
from alter_peft.evaluation.metrics.text import rouge_l
from alter_peft.report import evaluate_sets, format_table, plot_trade, write_results


FORGET = [Pair("Where does Alice live?", "Alice lives in Paris."), Pair("Who bakes?", "Bob bakes the bread.")]
WORLD = [
    Pair("What colour is the sky?", "Blue.", ("Seven million.", "Rye and honey.")),
    Pair("What do bees make?", "Bees make honey.", ("Bees make bread.",)),
    Pair("What is near the old bridge?", "Paris.", ("Falcon.", "Bob.", "The morning.")),
]
VALUES = {
    "before": {"forget": (0.9, 0.8, 1.0), "world": (0.4, 0.5, 0.6)},
    "after": {"forget": (0.0321, 0.25, 0.75, 0.125), "world": (0.4004, 0.5, 0.6, 0.0)},
}


OTHERS = ("rouge", "exact_memorization", "astray")
NAMES = {"forget": ("probability", *OTHERS), "world": ("normalized_probability", *OTHERS)}


def as_scores(values):
    return {
        model: Scores(
            Score(name, metric, value, [value])
            for name, row in sets.items()
            for metric, value in zip(NAMES[name], row, strict=False)
        )
        for model, sets in values.items()
    }


RESULTS = as_scores(VALUES)
TABLE = """\
| set | P before | P after | ROUGE-L before | ROUGE-L after | exact before | exact after | routed astray |
|---|---|---|---|---|---|---|---|
| forget | 0.900 | 0.032 | 0.800 | 0.250 | 1.000 | 0.750 | 0.125 |
| world (normalised) | 0.400 | 0.400 | 0.500 | 0.500 | 0.600 | 0.600 | 0.000 |"""


@pytest.fixture
def adapted(llama):
    """A random adapter whose router sends every token to the first forget expert."""
    torch.manual_seed(1)
    config = AlterConfig(num_forget_experts=2, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama, config).eval()
    router = next(module.token_router for module in model.modules() if hasattr(module, "token_router"))
    with torch.no_grad():
        router.alter_router["default"].weight.zero_()
        router.alter_router["default"].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    return model


def test_sets_are_measured_one_by_one(adapted, tokenizer):
    found = evaluate_sets(adapted, tokenizer, {"forget": FORGET, "world": WORLD}, ["forget"], 3, routed=True)
    of_answer = {"forget": "probability", "world": "normalized_probability"}
    assert list(found) == [Key(name, metric) for name, first in of_answer.items() for metric in (first, *OTHERS)]
    assert found[Key("forget", "probability")].value == pytest.approx(score_answers(adapted, tokenizer, FORGET).mean)
    assert found[Key("forget", "astray")].value == 0.0 and found[Key("world", "astray")].value == 1.0
    answers = generate_answers(adapted, tokenizer, WORLD)
    assert found[Key("world", "rouge")].rows == rouge_l(answers, [pair.completion for pair in WORLD])


def test_false_answers_normalise_the_probability(adapted, tokenizer):
    expected = []
    for pair in WORLD:
        answers = [pair.completion, *pair.wrong]
        values = [score_answers(adapted, tokenizer, [Pair(pair.prompt, answer)]).mean for answer in answers]
        expected.append(values[0] / sum(values))
    assert len({round(value, 3) for value in expected}) == len(WORLD)
    scores = evaluate_sets(adapted, tokenizer, {"world": WORLD}, [], 1, routed=False)
    found = scores[Key("world", "normalized_probability")].value
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found != pytest.approx(score_answers(adapted, tokenizer, WORLD).mean, rel=0.1)


def test_an_empty_set_is_refused(adapted, tokenizer):
    with pytest.raises(ValueError, match="`pairs` is empty"):
        evaluate_sets(adapted, tokenizer, {"forget": []}, ["forget"], 1, routed=False)


def test_table():
    assert format_table(RESULTS, adapted="after") == TABLE


def test_written_files(tmp_path):
    assert write_results(RESULTS, "after", tmp_path, "Title") == TABLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md", "trade.png"]
    assert (tmp_path / "table.md").read_text() == TABLE + "\n"
    written = json.loads((tmp_path / "results.json").read_text())
    assert {model: Scores.from_list(rows) for model, rows in written.items()} == RESULTS


def test_picture_has_a_bar_for_each_probability(tmp_path):
    plot_trade(RESULTS, tmp_path / "whole.png", "Title")
    none = {model: Scores(replace(score, value=0.0) for score in one.values()) for model, one in RESULTS.items()}
    plot_trade(none, tmp_path / "none.png", "Title")
    whole, empty = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("whole", "none"))
    assert whole.shape == empty.shape and whole.shape[2] == 4
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two, one a model
        mine = [(image[..., :3] * 255).round() == colour for image in (whole, empty)]
        inked, legend = (pixels.all(axis=-1).sum() for pixels in mine)
        assert inked > 3 * legend > 0  # bars of no height leave the legend's patch alone
