# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_llama
from datasets import Dataset, concatenate_datasets
from peft import PeftModel, get_peft_model_state_dict
from trainer_setup import forget_rows, retain_rows

from alter_peft import AlterConfig
from alter_peft.benchmark.methods import DEFAULT_METHODS, METHODS, UnlearningData, trained
from alter_peft.benchmark.requests import load_requests
from alter_peft.benchmark.teaching import teach
from alter_peft.evaluation import Pair, score_answers
from alter_peft.evaluation.loading import load


HOMES = (("Bob", "Lima"), ("Dora", "Oslo"), ("Fay", "Paris"), ("Hal", "Kiev"))
UNSEEN = [{"prompt": f"Where does {who} live?", "completion": f" {who} lives in {where}."} for who, where in HOMES]
DATA = UnlearningData(forget_rows().remove_columns("domain"), retain_rows(), Dataset.from_list(UNSEEN))
FORGET, RETAIN = ([Pair(row["prompt"], row["completion"]) for row in rows] for rows in (DATA.forget, DATA.retain))
# 8 rows are few steps an epoch
OPTIONS = {"learning_rate": 1e-2, "num_train_epochs": 20, "bf16": False, "disable_tqdm": True}


@pytest.fixture(scope="module")
def target(tokenizer, tmp_path_factory) -> Path:
    """A tiny model that knows both sets."""
    folder = tmp_path_factory.mktemp("taught") / "target"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder.parent / "cache")
        rows = concatenate_datasets([DATA.forget, DATA.retain])
        options = {"num_train_epochs": 60, "learning_rate": 3e-3, "bf16": False, "disable_tqdm": True}
        model = teach(make_llama(len(tokenizer)), tokenizer, rows, folder, 0, **options)
    assert min(score_answers(model, tokenizer, pairs).mean for pairs in (FORGET, RETAIN)) > 0.9
    return folder


def test_what_is_taught_is_saved_whole(target, tokenizer):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in target.iterdir()}
    assert not target.with_suffix(".partial").exists()
    model = load(target)
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", DEFAULT_METHODS)
def test_each_method_forgets_the_one_and_keeps_the_other(target, tokenizer, tmp_path, monkeypatch, method):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = METHODS[method].run(load(target), tokenizer, DATA, tmp_path / "run", 0, OPTIONS)
    forget, retain = (score_answers(model, tokenizer, pairs).mean for pairs in (FORGET, RETAIN))
    assert forget < 0.6 and retain > forget + 0.3, (forget, retain)
    again = PeftModel.from_pretrained(load(target), tmp_path / "run")
    assert score_answers(again, tokenizer, FORGET).mean == pytest.approx(forget, rel=1e-3)
    kind, config = method.partition("_")[0], again.peft_config["default"]
    assert isinstance(config, AlterConfig) == (kind in ("alter", "asymlora"))


SHORT = ("alter", "asymlora", "lora_npo")  # one of each kind of adapter


@pytest.mark.parametrize(
    "method", [one if one in SHORT else pytest.param(one, marks=pytest.mark.slow) for one in DEFAULT_METHODS]
)
def test_a_second_request_leaves_the_first_one_forgotten(target, tokenizer, tmp_path, monkeypatch, method):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parts = [DATA.forget.select(range(start, start + 4)) for start in (0, 4)]
    model = load(target)
    first: dict[str, torch.Tensor] = {}
    for number, rows in enumerate(parts):
        data = DATA._replace(forget=rows)
        model = METHODS[method].run(model, tokenizer, data, tmp_path / f"request-{number}", 0, OPTIONS)
        first = first or {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    found = [score_answers(model, tokenizer, pairs).mean for pairs in (FORGET[:4], FORGET[4:], RETAIN)]
    assert max(found[:2]) < 0.6 and found[2] > max(found[:2]) + 0.3, found
    if isinstance(model.peft_config["default"], AlterConfig):  # the second adapter was trained beside the first
        assert model.active_adapters == ["default", "request_1"]
        kept = get_peft_model_state_dict(model, adapter_name="default")
        assert all(torch.equal(value, first[name]) for name, value in kept.items())


FEW = DATA._replace(forget=DATA.forget.select(range(2)), retain=DATA.retain.select(range(2)))
STEP = {"learning_rate": 1e-2, "max_steps": 1, "bf16": False, "disable_tqdm": True, "activation_depth": 0.5}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DEFAULT_METHODS])
def test_every_other_method_takes_a_step(tokenizer, tmp_path, monkeypatch, method):
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)  # half of the time
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = make_llama(len(tokenizer), num_hidden_layers=2)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = METHODS[method].run(model, tokenizer, FEW, tmp_path / "run", 0, STEP)
    is_adapter = METHODS[method].adapter is not None
    assert isinstance(found, PeftModel) == is_adapter
    assert (tmp_path / "run" / ("adapter_config.json" if is_adapter else "config.json")).is_file()
    learned = [w for name, w in found.named_parameters() if "lora_B" in name or "alter_B" in name]
    moved = [not w.equal(base[name]) for name, w in found.named_parameters() if name in base]
    assert any(w.any() for w in learned) if is_adapter else any(moved)


@pytest.mark.parametrize("method", ["full_ga_kl", "full_npo"])
def test_all_weights_forget_the_one_and_keep_the_other(target, tokenizer, tmp_path, monkeypatch, method):
    """And are saved whole, as they are loaded and as a later request goes on from them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {**OPTIONS, "learning_rate": 1e-3}
    model = METHODS[method].run(load(target), tokenizer, DATA, tmp_path / "run", 0, options)
    forget, retain = (score_answers(model, tokenizer, pairs).mean for pairs in (FORGET, RETAIN))
    assert forget < 0.6 and retain > forget + 0.3, (forget, retain)
    again = trained(target, tmp_path / "run")
    assert score_answers(again, tokenizer, FORGET).mean == pytest.approx(forget, rel=1e-3)
    METHODS[method].run(model, tokenizer, FEW, tmp_path / "request-1", 0, STEP)
    later = load_requests(load(target), tmp_path, 1)
    assert score_answers(later, tokenizer, FORGET).mean != pytest.approx(forget, rel=1e-3)
