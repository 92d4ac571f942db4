# SPDX-License-Identifier: Apache-2.0
"""A run goes on from a checkpoint with what it was begun with, or says what differs before anything is computed."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_checkpoints import EACH_STEP
from tokenizers import normalizers
from trainer_setup import adapter_state, forget_rows, make_trainer, retain_rows

from alter_peft import AlterConfig, AlterUnlearnTrainer, UnlearnConfig, UnlearnTrainer
from alter_peft.trainer.same_run import BEGUN_WITH, _weights, difference


UNSEEN = Dataset.from_list([{"prompt": "Where does Ida live?", "completion": " Ida lives in Rome."}])
FIX = "start afresh: without `resume_from_checkpoint`, and with another `output_dir` to keep what is there."


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def begun(tokenizer, tmp_path_factory) -> Path:
    """Two of three steps with all 8 rows of each set, and a calibration row."""
    place = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        made(place, tokenizer, max_steps=2).train()
    return place


def made(place: Path, tokenizer: Any, **given: Any) -> AlterUnlearnTrainer:
    others = {"calibration_dataset": UNSEEN, **given.pop("others", {})}
    return make_trainer(place / "out", tokenizer, others=others, **{**EACH_STEP, **given})


def again(begun: Path, tmp_path: Path, tokenizer: Any, **given: Any) -> AlterUnlearnTrainer:
    shutil.copytree(begun / "out-checkpoints", tmp_path / "out-checkpoints")
    return made(tmp_path, tokenizer, **given)


def other_model(tokenizer: Any) -> Any:
    """As `make_llama` makes it, but for one weight in the middle of a layer."""
    model = make_llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight += 1e-3
    return model


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer to forget": ({"forget": forget_rows(6)}, r"`train_dataset` has 6 rows, but .* begun with 8 rows"),
    "others to retain": (
        {"retain": retain_rows().select(range(7, -1, -1))},
        r"`retain_dataset` has 8 rows, but .* begun with as many of other content, or in another order",
    ),
    "no calibration": (
        {"others": {"calibration_dataset": None}},
        r"`calibration_dataset` is not given, but .* begun with 1 row\.",
    ),
    "rank": ({"adapter": {"r": 2}}, r"`r` is 2, but .* begun with 4"),
    "targets": (
        {"adapter": {"target_modules": ["q_proj", "up_proj"]}},
        r"`target_modules` is \['q_proj', 'up_proj'\], but .* begun with",
    ),
    "router": ({"adapter": {"router_hidden_size": 0}}, r"`router_hidden_size` is 0, but .* begun with 64"),
    "seed": ({"seed": 3}, r"`seed` is 3, but .* begun with 42"),
    "rate": ({"learning_rate": 2e-2}, r"`learning_rate` is 0.02, but .* begun with 0.01"),
    "last rows": ({"dataloader_drop_last": True}, r"`dataloader_drop_last` is True, but .* begun with False"),
    "batch": ({"per_device_train_batch_size": 2}, r"the processes is 2, but .* begun with 4 forget rows a step"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_another_is_an_error_before_phase_one(begun, tmp_path, tokenizer, what):
    given, message = OTHERS[what]
    trainer = again(begun, tmp_path, tokenizer, **given)
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(resume_from_checkpoint=True)
    text = str(error.value)
    assert "\n" not in text and text.endswith(FIX) and "out-checkpoints/checkpoint-2' was begun" in text
    assert not trainer._prepared


def test_so_is_another_model(begun, tmp_path, tokenizer):
    trainer = again(begun, tmp_path, tokenizer, model=other_model(tokenizer))
    with pytest.raises(ValueError, match=r"`model` is '.*', but .* with other weights of this name, or in another"):
        trainer.train(resume_from_checkpoint=True)


def test_another_model_by_its_name(begun, tmp_path, tokenizer):
    other_model(tokenizer).save_pretrained(tmp_path / "taught")
    given = {"model": str(tmp_path / "taught")}
    with pytest.raises(ValueError, match=rf"`model` is {str(tmp_path / 'taught')!r}, but .* begun with"):
        again(begun, tmp_path, tokenizer, **given).train(resume_from_checkpoint=True)


def test_what_is_only_longer_or_elsewhere_goes_on(begun, tmp_path, tokenizer):
    """And to the very adapter of a run that was never stopped, with the batch in two parts."""
    straight = made(tmp_path / "straight", tokenizer)
    straight.train()
    free = {"save_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = again(begun, tmp_path, tokenizer, **free)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    expected = adapter_state(straight)
    for name, value in adapter_state(trainer).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_the_same_trainer_goes_on_after_it_has_trained(tmp_path, tokenizer):
    """All weights have moved by then: it is what it was made with that counts."""
    args = UnlearnConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, save_steps=1, bf16=False, report_to="none", forget_loss="ga",
        as_chat=False,
    )  # fmt: skip
    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)), args, train_dataset=forget_rows().remove_columns("domain"),
        retain_dataset=retain_rows(), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_another_kind_of_adapter(begun, tmp_path, tokenizer):
    shutil.copytree(begun / "out-checkpoints", tmp_path / "out-checkpoints")
    args = UnlearnConfig(output_dir=str(tmp_path / "out"), bf16=False, report_to="none", forget_loss="ga")
    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)), args, train_dataset=forget_rows().remove_columns("domain"),
        retain_dataset=retain_rows(), peft_config=LoraConfig(target_modules=["q_proj"]), processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`peft_config` makes an adapter of the kind LORA, but .* the kind ALTER\."):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_is_gone_on_from(begun, tmp_path, tokenizer, caplog):
    """One from the Hub, where whoever guesses a few rows could tell from their hash whether they were forgotten."""
    trainer = again(begun, tmp_path, tokenizer, seed=3)
    (tmp_path / "out-checkpoints" / "checkpoint-2" / BEGUN_WITH).unlink()
    trainer.train(resume_from_checkpoint=True)
    assert caplog.text.count("checkpoint-2' does not say what it was begun with") == 1


def test_the_command_line_looks_at_a_checkpoint_once(begun, tmp_path, tokenizer, monkeypatch, caplog):
    """Before phase I, and not again when it trains; `train` by itself looks anew."""
    trainer = again(begun, tmp_path, tokenizer)
    checkpoint = tmp_path / "out-checkpoints" / "checkpoint-2"
    (checkpoint / BEGUN_WITH).unlink()
    hashed: list[str] = []
    monkeypatch.setattr("alter_peft.trainer.checkpoints.check_weights", lambda folder, *_: hashed.append(folder))
    trainer.check_goes_on(str(checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert caplog.text.count("does not say what it was begun with") == 1 and hashed == []
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert caplog.text.count("does not say what it was begun with") == 2 and hashed == [str(checkpoint)]


DAMAGED = ["", "{", "[]", "{}", "\xff", '{"kind": "ALTER"}']
WHOLE = {
    "kind": None, "reference": None, "step": 4, "arguments": {}, "adapter": {}, "rows": {}, "tokens": {},
    "model": {"name": "", "sha256": ""},
}  # fmt: skip
DAMAGED += [
    json.dumps({**WHOLE, name: value}) for name in WHOLE if name not in ("kind", "reference") for value in ("4", [])
]
DAMAGED += [
    json.dumps({**WHOLE, "rows": {"train_dataset": 3}}),
    json.dumps({**WHOLE, "tokens": {"train_dataset": {}}}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_one_that_is_damaged_is_said_to_be(tmp_path, caplog, text):
    (tmp_path / BEGUN_WITH).write_bytes(text.encode("latin-1"))
    assert difference(tmp_path, WHOLE) is None
    assert re.search(r"what the checkpoint was begun with, (cannot be read|is damaged or incomplete)", caplog.text)
    assert "older version" not in caplog.text


def test_a_whole_one_of_nothing_is_the_same(tmp_path, caplog):
    (tmp_path / BEGUN_WITH).write_text(json.dumps(WHOLE))
    assert difference(tmp_path, WHOLE) is None and caplog.text == ""


def test_so_are_other_tokens(begun, tmp_path, tokenizer):
    """Of the same rows, by a tokenizer of as many."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    message = r"`train_dataset` gives other tokens than at the start: another tokenizer or chat template, but .* with"
    with pytest.raises(ValueError, match=message):
        again(begun, tmp_path, other).train(resume_from_checkpoint=True)


def test_so_is_a_reference(tmp_path, tokenizer):
    references = [str(tmp_path / name) for name in ("before", "smaller")]
    for seed, folder in enumerate(references, start=1):
        make_llama(len(tokenizer), seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def with_reference(folder: str) -> AlterUnlearnTrainer:
        given = {"reference_model": folder, "calibration_dataset": None}
        return made(tmp_path, tokenizer, others=given, forget_loss="tokens", max_steps=1)

    with_reference(references[0]).train()
    message = rf"`reference_model` is {references[1]!r}, but .* begun with {references[0]!r}"
    with pytest.raises(ValueError, match=message):
        with_reference(references[1]).train(resume_from_checkpoint=True)


def test_so_is_an_adapter_that_acts_beside(begun, tmp_path, tokenizer):
    """It is a part of the model; one that does not act is not."""

    def with_other(active: list[str], shift: float) -> Any:
        torch.manual_seed(0)
        config = AlterConfig(entropy_quantile=0.6, r=4, num_forget_experts=2)
        model = get_peft_model(make_llama(len(tokenizer)), config)
        model.add_adapter("other", config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".other" in name:
                    weight += shift
        model.base_model.set_adapter(active)
        return model

    both, alone = ["default", "other"], ["default"]
    assert _weights(with_other(both, 0.0)) != _weights(with_other(both, 0.1))
    assert _weights(with_other(both, 0.0)) != _weights(with_other(alone, 0.0))
    assert _weights(with_other(alone, 0.0)) == _weights(with_other(alone, 0.1)) == _weights(make_llama(len(tokenizer)))


def adapted(tokenizer: Any, name: str) -> Any:
    """A model with a LoRA adapter of this name."""
    torch.manual_seed(0)
    return get_peft_model(make_llama(len(tokenizer)), LoraConfig(target_modules=["q_proj"]), adapter_name=name)


@pytest.mark.parametrize("name", ["default", "model", "weight", "base_layer"])
def test_no_name_of_an_adapter_hides_the_base(tokenizer, name):
    model = adapted(tokenizer, name)
    expected = _weights(make_llama(len(tokenizer)))
    assert _weights(model) == expected
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter += 1
    assert _weights(model) == expected
    for parameter in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        with torch.no_grad():
            parameter.flatten()[0] += 1
        changed = _weights(model)
        assert changed != expected
        expected = changed
