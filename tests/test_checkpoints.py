# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints lie, what is delivered, and which checkpoint a run goes on from."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from test_trainer import base_passes
from trainer_setup import adapter_state, forget_rows, make_args, make_trainer, retain_rows

from alter_peft import AlterConfig, UnlearnConfig, UnlearnTrainer
from alter_peft.trainer import phase_one
from alter_peft.trainer.checkpoints import is_whole, last_checkpoint
from alter_peft.tuner.saving import NotSavedError


EACH_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "adapter": {}}
DELIVERED = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
OF_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What phase I computes on disk is kept from other tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    """`out` and `out-checkpoints`, of three steps."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        trainer = make_trainer(place / "out", tokenizer, **EACH_STEP)
        trainer.train()
        trainer.save_model()
    return place


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """`run`, to be changed."""
    for name in ("out", "out-checkpoints"):
        shutil.copytree(run / name, tmp_path / name)  # with the times
    return tmp_path


# ---- where ----------------------------------------------------------------------------------------------------------


def test_what_is_delivered_is_alone(run):
    assert DELIVERED <= names(run / "out") <= DELIVERED | OF_TOKENIZER
    assert names(run / "out-checkpoints") == {".last-fresh-start", "checkpoint-1", "checkpoint-2", "checkpoint-3"}
    inside = names(run / "out-checkpoints" / "checkpoint-3")
    assert DELIVERED | {"training_args.bin", "optimizer.pt", "trainer_state.json"} <= inside
    assert (
        str(run / "out-checkpoints" / "checkpoint-3")
        in (run / "out-checkpoints" / "checkpoint-3" / "README.md").read_text()
    )


@pytest.mark.parametrize("adapter", [LoraConfig(target_modules=["q_proj"], r=2), None], ids=["lora", "all-weights"])
def test_so_it_is_by_the_other_trainer(tmp_path, tokenizer, adapter):
    args = UnlearnConfig(
        output_dir=str(tmp_path / "out"), checkpoint_dir=str(tmp_path / "elsewhere" / "of-it"), max_steps=2,
        save_steps=1, bf16=False, report_to="none", forget_loss="ga",
    )  # fmt: skip
    trainer = UnlearnTrainer(
        make_llama(len(tokenizer)), args, train_dataset=forget_rows().remove_columns("domain"),
        retain_dataset=retain_rows(), peft_config=adapter, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    if adapter is None:
        weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert weights <= names(tmp_path / "out") <= weights | OF_TOKENIZER | {"README.md"}
    assert names(tmp_path / "elsewhere" / "of-it") == {".last-fresh-start", "checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize(
    "output, expected",
    [("a/out", "a/out-checkpoints"), ("a/out/", "a/out-checkpoints"), (".", None), ("b/..", None)],
)
def test_checkpoints_lie_beside(output, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = make_args(Path(output)).checkpoint_dir
    place = {".": tmp_path, "b/..": tmp_path}.get(output, tmp_path)
    assert found == (expected or str(place.with_name(f"{place.name}-checkpoints")))


def test_an_old_adapter_and_its_card_stay_until_the_new_one_is_saved(copied, tokenizer, caplog):
    before = {path.name: path.read_bytes() for path in (copied / "out").iterdir()}
    trainer = make_trainer(copied / "out", tokenizer, seed=5, **EACH_STEP)
    assert f"`output_dir` holds an adapter already ('{copied / 'out'}'). It stays as it is until" in caplog.text
    assert "starts afresh" not in caplog.text
    trainer.train()
    assert f"'{copied / 'out-checkpoints'}' holds checkpoints of an earlier run, up to checkpoint-3" in caplog.text
    assert {path.name: path.read_bytes() for path in (copied / "out").iterdir()} == before
    trainer.save_model()
    assert (copied / "out" / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


def test_a_first_run_says_nothing_of_the_kind(tmp_path, tokenizer, caplog):
    make_trainer(tmp_path / "out", tokenizer, **EACH_STEP).train()
    assert "already" not in caplog.text and "earlier run" not in caplog.text


# ---- from which one -------------------------------------------------------------------------------------------------


def test_true_is_the_last_whole_one(run, copied, tokenizer):
    """One that the process was killed in is none, whatever its step."""
    expected = adapter_state_of(run / "out", tokenizer)
    checkpoints = copied / "out-checkpoints"
    (checkpoints / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 0.')
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-4")
    (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-5")
    (checkpoints / "checkpoint-5" / "checkpoint-is-incomplete.txt").touch()
    (checkpoints / "checkpoint-last").mkdir()
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    trainer = make_trainer(copied / "out", tokenizer, **EACH_STEP)
    batches: list[Any] = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: batches.append(1) or step(*args, **kwargs)  # type: ignore
    trainer.train(resume_from_checkpoint=True)
    assert len(batches) == 1 and trainer.state.global_step == 3
    for name, value in adapter_state(trainer).items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6)


def adapter_state_of(folder: Path, tokenizer: Any) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(make_llama(len(tokenizer)), folder)
    return {name: value for name, value in model.state_dict().items() if ".alter_" in name}


def test_a_finished_run_makes_no_step_when_it_is_resumed(run, copied, tokenizer):
    """In the middle of an epoch, where transformers alone makes one more."""
    expected = adapter_state_of(run / "out", tokenizer)
    trainer = make_trainer(copied / "out", tokenizer, **EACH_STEP)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    for name, value in adapter_state(trainer).items():
        assert torch.equal(value, expected[name])


def test_a_higher_step_of_an_earlier_run_is_not_the_last_one(copied, tokenizer):
    make_trainer(copied / "out", tokenizer, **{**EACH_STEP, "max_steps": 1}).train()
    assert last_checkpoint(copied / "out-checkpoints") == copied / "out-checkpoints" / "checkpoint-1"


def test_a_copy_has_the_same_last_one(copied, tokenizer):
    """Whatever the times of its files, and without the hidden file beside them; 10 is more than 2."""
    checkpoints = copied / "out-checkpoints"
    (checkpoints / "checkpoint-3").rename(checkpoints / "checkpoint-10")
    for hour, step in enumerate((10, 1, 2)):
        os.utime(checkpoints / f"checkpoint-{step}" / "trainer_state.json", (3600 * hour, 3600 * hour))
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-10"
    (checkpoints / ".last-fresh-start").rename(copied / "started")
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-10"
    (copied / "started").rename(checkpoints / ".last-fresh-start")
    make_trainer(copied / "out", tokenizer, **{**EACH_STEP, "max_steps": 1}).train()
    for started in (True, False):  # those of the run before are left
        assert (checkpoints / ".last-fresh-start").exists() == started
        assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
        (checkpoints / ".last-fresh-start").unlink(missing_ok=True)


def test_what_came_after_a_checkpoint_that_a_run_went_on_from_is_of_another_one(copied, tokenizer):
    checkpoints = copied / "out-checkpoints"
    trainer = make_trainer(copied / "out", tokenizer, **EACH_STEP)
    trainer._to_resume(str(checkpoints / "checkpoint-3"))
    (checkpoints / "checkpoint-3").rename(copied / "aside")
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"  # it went on from the last: the same run
    (copied / "aside").rename(checkpoints / "checkpoint-3")
    trainer._to_resume(str(checkpoints / "checkpoint-1"))
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-1"))
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"


def test_a_run_that_ended_before_its_first_checkpoint_has_none(copied, tokenizer):
    """Those of the run before are of other settings."""
    trainer = make_trainer(copied / "out", tokenizer, **EACH_STEP)
    trainer._to_resume(None)
    with pytest.raises(ValueError, match="has no whole checkpoint of the last run"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(copied / "out-checkpoints" / "checkpoint-3"))


def broken(checkpoints: Path, how: str) -> str:
    if how == "nowhere":
        return str(checkpoints / "checkpoint-7")
    folder = checkpoints / "checkpoint-3"
    if how == "an adapter":
        return str(checkpoints.parent / "out")
    if how == "interrupted":
        (folder / "trainer_state.json").write_text("{")
    if how == "damaged":
        weights = folder / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    return str(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        (
            "nowhere",
            r"`resume_from_checkpoint` is '.*checkpoint-7', but there is no such folder: .*one is '.*point-3'",
        ),
        ("an adapter", r"but there is no trainer_state\.json: it is no whole checkpoint"),
        (
            "interrupted",
            r"whose writing was interrupted: it is no whole checkpoint\. The last whole one is '.*point-2'",
        ),
        ("damaged", r"adapter_model\.safetensors is damaged, or of another adapter"),
    ],
)
def test_one_that_cannot_be_resumed_is_an_error_before_phase_one(copied, tokenizer, how, message):
    path = broken(copied / "out-checkpoints", how)
    trainer = make_trainer(copied / "out", tokenizer, **EACH_STEP)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=path)
    assert not trainer._prepared


def test_none_to_resume_is_an_error_before_phase_one(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path / "out", tokenizer, **EACH_STEP)
    with pytest.raises(
        ValueError, match=r"is True, but '.*out-checkpoints' has no whole checkpoint of the last run\. Start"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert not trainer._prepared
    trainer.train(resume_from_checkpoint=False)


# ---- what cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_dir", "checkpoint_dir"])
def test_a_folder_that_is_a_file(tmp_path, tokenizer, name):
    (tmp_path / "file").touch()
    folders = {"output_dir": tmp_path / "out", "checkpoint_dir": tmp_path / "c", name: tmp_path / "file"}
    with pytest.raises(ValueError, match=rf"`{name}` is '.*file', but that is a file\. Give a folder\."):
        make_trainer(folders["output_dir"], tokenizer, checkpoint_dir=str(folders["checkpoint_dir"]), **EACH_STEP)


@pytest.mark.parametrize("name", ["out", "out-checkpoints"])
def test_a_folder_that_is_read_only(tmp_path, tokenizer, monkeypatch, name):
    make = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(
        ValueError, match=rf"is '.*{name}', but nothing can be written there \(Read-only file system\)"
    ):
        make_trainer(tmp_path / "out", tokenizer, **EACH_STEP)


def test_a_disk_that_fills_up_during_the_training(copied, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in (copied / "out").iterdir()}
    trainer = make_trainer(copied / "out", tokenizer, seed=7, **EACH_STEP)
    save = torch.save

    def full(content: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        if str(place).endswith("optimizer.pt"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")
        save(content, place, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        NotSavedError, match=r"nothing could be saved to '.*checkpoint-1' .* Earlier checkpoints are whole"
    ):
        trainer.train()
    assert [is_whole(copied / "out-checkpoints" / f"checkpoint-{step}") for step in (1, 2, 3)] == [False, True, True]
    assert {path.name: path.read_bytes() for path in (copied / "out").iterdir()} == before


# ---- phase I's cache ------------------------------------------------------------------------------------------------


def test_a_cache_that_is_half_there_is_not_read(tmp_path, tokenizer):
    assert base_passes(make_trainer(tmp_path, tokenizer, adapter={})) > 0
    (cached,) = (tmp_path / "cache" / "alter_peft").iterdir()
    whole = cached.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        cached.write_bytes(whole[:length])
        assert base_passes(make_trainer(tmp_path, tokenizer, adapter={})) > 0
        assert cached.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, tokenizer, monkeypatch, caplog):
    def full(*args: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(phase_one, "save_file", full)
    make_trainer(tmp_path / "out", tokenizer, adapter={}, max_steps=1).train()
    assert "Phase I could not be kept for another run in" in caplog.text and "No space left" in caplog.text


def test_a_named_adapter_is_said_to_be_there(tmp_path, tokenizer, caplog):
    model = get_peft_model(make_llama(len(tokenizer)), AlterConfig(domains=["home", "bread"]), adapter_name="later")
    model.save_pretrained(tmp_path / "out")
    make_trainer(tmp_path / "out", tokenizer, adapter={})
    assert f"`output_dir` holds an adapter already ('{tmp_path / 'out' / 'later'}')" in caplog.text
