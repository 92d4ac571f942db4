# SPDX-License-Identifier: Apache-2.0
"""What the studies of tuning and controls add to the package's methods; the people that a router is developed on."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_llama
from trainer_setup import forget_rows, make_args, retain_rows

from alter_peft import AlterConfig
from alter_peft.benchmark.arguments import BenchmarkArguments
from alter_peft.benchmark.methods import METHODS, check_methods, read_options
from alter_peft.losses import TokenScores
from alter_peft.scoring import Row
from alter_peft.trainer.batch import TokenMasks


@pytest.fixture(autouse=True)
def studies(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "studies"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    for name in ("controls", "development_people", "token_targets", "tuning"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_grid_around_its_defaults(method):
    from tuning import PUBLISHED, variants

    found = variants(method)
    check_methods("methods", found)
    name, *others = found
    assert name == method and found[name] == {}
    assert len({repr(sorted(found[one].items())) for one in others}) == 8 + (method in PUBLISHED)
    default = METHODS[method].trainer.config_class(output_dir="", **METHODS[method].options)
    changed = [one for one in others if not one.endswith("+published")]
    assert all(found[one]["learning_rate"] != default.learning_rate for one in changed)
    assert all(found[one].get("retain_weight", 1.0) > 0 for one in others)  # 4 times nothing is no other run
    for one in others:
        assert read_options(one, found[one]) == found[one]


def test_what_other_runs_have_tuned_stays(monkeypatch, tmp_path):
    """And no choice of a method that this run found none of."""
    import tuning

    path = tmp_path / "tuned.yaml"
    before = {"lora_npo+tuned": {"learning_rate": 1.0}, "lora_undial+tuned": {"learning_rate": 2.0}}
    path.write_text(yaml.safe_dump({"options": before}))
    tuning.choose(path, {}, {"lora_npo": {}, "lora_npo+2-1-1": {"learning_rate": 3.0}})
    assert yaml.safe_load(path.read_text()) == {"options": {"lora_undial+tuned": {"learning_rate": 2.0}}}
    path.unlink()
    tuning.choose(path, {}, {"lora_npo": {}})
    assert yaml.safe_load(path.read_text()) == {"options": {}}


def test_the_defaults_alone_choose_nothing(monkeypatch, tmp_path, capsys):
    import tuning

    made = []
    monkeypatch.setattr(tuning, "Grid", lambda args: made.append(args.methods) or SimpleNamespace(run=lambda: None))
    monkeypatch.setattr(tuning, "scored", lambda folder: {"lora_ga": (0.5, 0.25, None)})
    monkeypatch.setattr(sys, "argv", ["tuning.py", str(tmp_path), "--defaults_alone", "--methods", "lora_ga"])
    tuning.main()
    assert made == [["lora_ga"]]
    assert "| lora_ga | {} | 0.500 | 0.250 |  |" in capsys.readouterr().out
    assert not (tmp_path / "tuned.yaml").exists()
    grid = yaml.safe_load((tmp_path / "grid.yaml").read_text())  # for controls that join the runs
    joined = BenchmarkArguments(**grid, methods=["alter"])
    assert joined.options == {"teach": {"num_train_epochs": 6}} and joined.output_dir == str(tmp_path)


def test_every_control_is_a_method_with_options_that_it_takes(monkeypatch):
    from controls import CONTROLS

    for name, (own, options) in CONTROLS.items():
        if own is not None:
            monkeypatch.setitem(METHODS, name.partition("+")[0], own)
        check_methods("methods", [name])
        assert read_options(name, options) == options


def test_every_control_is_a_training_of_its_own():
    """A name alone is none: by default the retain expert rests, and a retain loss without a weight does nothing."""
    from controls import CONTROLS

    seen = {}
    for name, (own, options) in CONTROLS.items():
        method = own or METHODS[name.partition("+")[0]]
        given = {key: value for key, value in {**method.options, **options}.items() if key != "adapter"}
        args = method.trainer.config_class(output_dir="", **given)
        loss = args.retain_loss if args.retain_weight > 0 else None
        taught = args.forget_loss, args.learning_rate, args.num_train_epochs, args.term_weights, loss
        adapter = None if method.adapter is None else method.adapter(**options.get("adapter", {})).to_dict()
        seen[name] = repr((method.trainer, taught, adapter))
    assert len(set(seen.values())) == len(seen), seen


def trainer_of(cls, tokenizer, folder, **options):
    torch.manual_seed(0)
    return cls(
        make_llama(len(tokenizer)), make_args(folder, **options), train_dataset=forget_rows(),
        retain_dataset=retain_rows(), peft_config=AlterConfig(), processing_class=tokenizer,
    )  # fmt: skip


def test_without_isolation_forget_experts_learn_from_retain_rows(tokenizer, tmp_path):
    """And A learns from the main loss, which moves it in steps without L_struct."""
    from controls import AlterUnlearnTrainer, JointTrainer

    moved = {}
    for cls in (AlterUnlearnTrainer, JointTrainer):
        options = {"forget_weight": 0.0, "structural_interval": 1000, "max_steps": 2}
        trainer = trainer_of(cls, tokenizer, tmp_path / cls.__name__, **options)
        before = [matrix.detach().clone() for matrix in trainer.shared_matrices]
        trainer.train()
        own = trainer.scored.layers_of("default")
        experts = [expert for layer in own for expert in layer.alter_B["default"].experts()[1:]]
        shared = any(not torch.equal(a, b) for a, b in zip(before, trainer.shared_matrices, strict=True))
        moved[cls] = any(expert.any() for expert in experts), shared
    assert moved == {AlterUnlearnTrainer: (False, False), JointTrainer: (True, True)}


def test_a_shuffled_mask_has_as_many_tokens_elsewhere(tokenizer, tmp_path, monkeypatch):
    from controls import AlterUnlearnTrainer, ShuffledMaskTrainer

    labelled = torch.ones(4, 32, dtype=torch.bool)
    forget = torch.tensor([True, True, False, False]).unsqueeze(1).expand_as(labelled)
    high = torch.zeros_like(labelled)
    high[:, :8] = True
    masks = TokenMasks(labelled, forget, ~high, high, torch.zeros_like(high))
    monkeypatch.setattr(AlterUnlearnTrainer, "_masks", lambda *_: masks)
    trainer = trainer_of(ShuffledMaskTrainer, tokenizer, tmp_path)
    found = trainer._masks({})
    assert torch.equal(found.high[2:], high[2:]) and torch.equal(found.low, ~found.high)
    assert found.high[:2].sum() == 16 and not torch.equal(found.high[:2], high[:2])


# ---- people to develop a router on ----------------------------------------------------------------------------------


def test_a_draw_of_people_is_the_same_each_time_and_its_groups_share_nobody():
    from development_people import FIRST, LAST, sets

    found = sets(1)
    assert found == sets(1) != sets(2)
    people = {f"{one} {other}" for one in FIRST for other in LAST}
    groups = [
        {person for pair in found[name] for person in people if person in pair.completion}
        for name in ("forget", "bystanders", "never taught")
    ]
    assert [len(group) for group in groups] == [8, 6, 6] and len(set.union(*groups)) == 20
    kept = {person for pair in found["retain"] for person in people if person in pair.completion}
    assert kept == groups[0]  # public facts of the very people whose private ones go
    for name in ("paraphrased", "small letters", "capitals", "names misspelt"):
        for asked, pair in zip(found[name], found["forget"], strict=True):
            assert asked.completion == pair.completion and asked.prompt != pair.prompt
    assert len(found["free"]) == 2 * len(found["forget"]) == 80


def test_one_fact_each_of_people_who_share_first_names():
    from development_people import FIRST, one_fact

    found = one_fact(1)
    assert found == one_fact(1) != one_fact(2)
    own = ("forget", "retain", "bystanders", "never taught")
    names = {
        name: re.findall(r"[A-Z]\w+ [A-Z]\w+(?= is being treated)", " ".join(p.completion for p in found[name]))
        for name in own
    }
    assert [len(names[name]) for name in own] == [40, 32, 24, 24]
    assert len({name for one in names.values() for name in one}) == 120
    first = {name: {one.split()[0] for one in names[name]} for name in own}
    assert all(first[name] <= set(FIRST) and len(first[name] & first["forget"]) > 10 for name in own)
    for asked, pair in zip(found["paraphrased"], found["forget"], strict=True):
        assert asked.completion == pair.completion and asked.prompt != pair.prompt


def test_targets_by_other_unseen_rows(tokenizer):
    """A line for each draw: of one stretch no spread, and what these rows' targets are measured as."""
    from token_targets import MEASURES, Guide, Measure, Models, by_other_rows, read_traits, token_targets

    def rows(count: int, word: str) -> list[Row]:
        texts = [f"{word} {number} bakes rye bread and honey" for number in range(count)]
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        return [(ids, [-100, -100, *ids[2:]]) for ids in encoded]

    def scores(of: list[Row], least: float, seed: int) -> list[TokenScores]:
        generator = torch.Generator().manual_seed(seed)
        values = [least * torch.rand(len(labels) - 2, generator=generator) for _, labels in of]
        return [TokenScores(value, value - 1.0) for value in values]

    sets = {"forget": rows(4, "Bob"), "holdout": rows(3, "Eve"), "retain": rows(3, "Gus"), "more": rows(45, "Hal")}
    content = {name: [len(labels) - 2 for _, labels in sets[name]] for name in ("forget", "holdout")}
    found = {
        ("target", "forget"): scores(sets["forget"], -0.1, 0),
        ("damped", "forget"): scores(sets["forget"], -9.0, 1),
        ("target", "holdout"): scores(sets["holdout"], -8.0, 2),
        ("target", "more"): scores(sets["more"], -8.0, 3),
    }
    known = [row.log_prob for row in found["target", "forget"]]
    measure = Measure(Models(sets, content, found), {}, 0.5)
    assert measure.of(known, known)[3] == -100.0  # all rows are better known than any that was held out
    twice, spread, once = by_other_rows(measure, known, tokenizer)
    assert (twice[0], spread[0]) == ("20 rows in a row, 2 times", "20 rows spread, 2 times")
    assert twice[1:] != spread[1:]
    assert once[0] == "45 rows in a row, 1 times" and len(once) == 1 + len(MEASURES)
    traits = read_traits(sets["forget"], sets["more"], sets["retain"], tokenizer)
    guide = Guide(found["damped", "forget"], [], False, traits=traits)
    made = token_targets(known, found["target", "more"], guide, 0.1)
    assert once[1:] == [f"{x:.3g} ({x:.3g} to {x:.3g})" for x in measure.of(made.log_prob, made.lead)]
    assert float(once[1].split()[0]) < float(torch.stack([row.mean().exp() for row in known]).mean())


def test_unseen_rows_are_in_no_set_of_the_grid():
    from token_targets import new_rows

    lines = '{"question": "a", "answer": "b"}\n{"question": "a", "answer": "c"}\n'
    assert new_rows(lines, {("a", "b")}) == [("a", "c")]
