# SPDX-License-Identifier: Apache-2.0
"""A save is one step: what is loaded after a crash at any moment is the old adapter or the new one."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alter_peft import AlterConfig
from alter_peft.evaluation.loading import load_model, load_tokenizer, loaded
from alter_peft.tuner import saving
from alter_peft.tuner.export import export_to_lora
from alter_peft.tuner.saving import NO_CHECKSUM, NotSavedError, finish_save, one_save, sha256


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(2, 14)[None]
DOMAINS = {"old": ["a", "b"], "new": ["c", "d"]}


def base() -> LlamaForCausalLM:
    return make_llama(32)


def adapted(version: str, names: tuple[str, ...] = ("default",), **options: Any) -> PeftModel:
    """One of two models whose adapters differ in config and weights."""
    torch.manual_seed(len(version) + ord(version[0]))
    scale = {"old": 16, "new": 32}[version]
    configs = [
        AlterConfig(
            domains=DOMAINS[version], lora_alpha=scale, r=2, init_weights=False, target_modules=["q_proj"], **options
        )
        for _ in names
    ]
    model = get_peft_model(base(), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    return model.eval()


def outputs(model: Any) -> list[float]:
    with torch.no_grad():
        return model(IDS).logits.flatten().tolist()


class Killed(BaseException):
    pass


class Crash:
    """Ends what is done at a given one of the steps that change files, and lets nothing else happen after it."""

    def __init__(self, patch: pytest.MonkeyPatch, step: int, error: BaseException | None = None) -> None:
        self.step, self.count, self.error = step, 0, error
        for owner, name in (
            (os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
            (shutil, "rmtree"), (shutil, "copyfile"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    @property
    def over(self) -> bool:
        return self.count >= self.step

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.error is not None and self.count == self.step:
                raise self.error
            if self.error is None and self.over:
                raise Killed
            return call(*args, **kwargs)

        return counted


def crashes(change: Callable[[], Any], start: Path | None, folder: Path) -> Iterator[int]:
    """Every step of a change of `folder`, which begins as a copy of `start`, after a crash there."""
    for step in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        if start is not None:
            shutil.copytree(start, folder)
        with pytest.MonkeyPatch.context() as patch:
            crash = Crash(patch, step)
            try:
                change()
            except Killed:
                pass
            else:
                assert not crash.over
                return
        yield step
    raise AssertionError("there is no end of steps")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """The two adapters, each in a folder."""
    place = tmp_path_factory.mktemp("saved")
    for version in DOMAINS:
        adapted(version).save_pretrained(place / version)
    return {version: place / version for version in DOMAINS}


# ---- crashes --------------------------------------------------------------------------------------------------------


def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new(saved, tmp_path):
    new = adapted("new")
    expected = {version: outputs(adapted(version)) for version in DOMAINS}
    found = []
    for _ in crashes(lambda: new.save_pretrained(tmp_path / "out"), saved["old"], tmp_path / "out"):
        model = PeftModel.from_pretrained(base(), tmp_path / "out")
        version = next(name for name, values in expected.items() if values == outputs(model))
        assert model.peft_config["default"].domains == DOMAINS[version]
        found.append(version)
        new.save_pretrained(tmp_path / "out")  # and the next save is as any
        assert outputs(PeftModel.from_pretrained(base(), tmp_path / "out")) == expected["new"]
        assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    first = found.index("new")
    assert first > 5 and len(found) - first > 3 and set(found[first:]) == {"new"}


def test_into_an_empty_folder(tmp_path):
    new = adapted("new")
    found = []
    for _ in crashes(lambda: new.save_pretrained(tmp_path / "out"), None, tmp_path / "out"):
        try:
            model = PeftModel.from_pretrained(base(), tmp_path / "out")
        except ValueError as error:
            assert "Can't find 'adapter_config.json'" in str(error)
            found.append(False)
        else:
            assert outputs(model) == outputs(new)
            found.append(True)
    assert found == sorted(found) and set(found) == {False, True}


def test_adapters_of_one_model_are_all_old_or_all_new(tmp_path):
    names = ("default", "later")
    adapted("old", names).save_pretrained(tmp_path / "old")
    new, found = adapted("new", names), []
    for _ in crashes(lambda: new.save_pretrained(tmp_path / "out"), tmp_path / "old", tmp_path / "out"):
        model = PeftModel.from_pretrained(base(), tmp_path / "out" / "later", adapter_name="later")
        model.load_adapter(tmp_path / "out", "default")
        domains = [model.peft_config[name].domains for name in names]
        assert domains[0] == domains[1]
        found.append(domains[0])
    assert found[0] == DOMAINS["old"] and found[-1] == DOMAINS["new"]


def test_the_base_that_the_config_names_is_the_adapters(saved, tmp_path):
    """`AutoPeftModel` reads the name of the base before ALTER is asked."""
    for version in DOMAINS:
        config = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": float(ord(version[0]))},
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / f"base-{version}")
    start = tmp_path / "start"
    for version, place in (("old", start), ("new", tmp_path / "new")):
        model = adapted(version, task_type="CAUSAL_LM")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / f"base-{version}")
        model.save_pretrained(place)
    for _ in crashes(lambda: model.save_pretrained(tmp_path / "out"), start, tmp_path / "out"):
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
        theta = loaded.config.rope_parameters["rope_theta"]
        assert loaded.peft_config["default"].domains == DOMAINS["old" if theta == ord("o") else "new"]


def test_transformers_own_loading_is_refused_until_the_save_is_finished(saved, tmp_path):
    new, seen = adapted("new"), []
    for _ in crashes(lambda: new.save_pretrained(tmp_path / "out"), saved["old"], tmp_path / "out"):
        model = base()
        try:
            model.load_adapter(str(tmp_path / "out"))
        except ValueError as error:
            assert NO_CHECKSUM in str(error)
            seen.append("refused")
        else:
            seen.append(next(name for name in DOMAINS if DOMAINS[name] == model.peft_config["default"].domains))
            assert outputs(model) == outputs(adapted(seen[-1]))
    assert set(seen) == {"old", "refused", "new"}


def test_an_exported_lora_is_old_or_new_or_says_what_to_do(tmp_path):
    models = {version: adapted(version, router="static") for version in DOMAINS}
    for version, model in models.items():
        export_to_lora(model, tmp_path / version)
    seen = []
    for _ in crashes(lambda: export_to_lora(models["new"], tmp_path / "out"), tmp_path / "old", tmp_path / "out"):
        try:
            lora = PeftModel.from_pretrained(base(), tmp_path / "out").eval()
        except KeyError as error:
            assert NO_CHECKSUM in str(error) and "finish_save" in str(error)
            finish_save(tmp_path / "out")
            lora = PeftModel.from_pretrained(base(), tmp_path / "out").eval()
            seen.append("refused")
        version = next(
            name for name in DOMAINS if lora.peft_config["default"].lora_alpha == {"old": 16, "new": 32}[name]
        )
        torch.testing.assert_close(outputs(lora), outputs(models[version]), atol=1e-4, rtol=1e-4)
        seen.append(version)
    assert set(seen) == {"old", "refused", "new"}


def test_a_model_of_all_weights_leaves_nothing_that_would_be_loaded_instead(tmp_path):
    sharded, adapter = tmp_path / "sharded", tmp_path / "out"
    base().save_pretrained(sharded, max_shard_size="20KB")
    adapter.mkdir()
    (adapter / "notes.txt").write_text("mine")
    make_llama(32, seed=1).save_pretrained(adapter)  # a single file

    def change() -> None:
        with one_save(adapter) as beside:
            shutil.copytree(sharded, beside, dirs_exist_ok=True)

    shutil.copytree(adapter, tmp_path / "start")
    for _ in crashes(change, tmp_path / "start", adapter):
        finish_save(adapter)
        found = {path.name for path in adapter.iterdir() if not path.name.startswith(".")}
        assert "notes.txt" in found
        single = "model.safetensors" in found
        assert outputs(LlamaForCausalLM.from_pretrained(adapter)) == outputs(
            make_llama(32, seed=1) if single else base()
        )
        if not single:
            assert found == {path.name for path in sharded.iterdir()} | {"notes.txt"}
    adapted("old").save_pretrained(adapter)
    change()
    assert not (adapter / CONFIG).exists() and outputs(AutoModelForCausalLM.from_pretrained(adapter)) == outputs(
        base()
    )


def test_the_command_line_finishes_a_save_of_any_kind(tmp_path):
    """Also of plain LoRA and of a whole model, whose loaders know nothing of it."""
    base().save_pretrained(tmp_path / "new")
    make_llama(32, seed=1).save_pretrained(tmp_path / "old")

    def change() -> None:
        with one_save(tmp_path / "out") as beside:
            shutil.copytree(tmp_path / "new", beside, dirs_exist_ok=True)

    found = []
    for _ in crashes(change, tmp_path / "old", tmp_path / "out"):
        model = loaded("model", str(tmp_path / "out"), load_model)
        found.append(outputs(model))
    assert found[0] == outputs(make_llama(32, seed=1)) and found[-1] == outputs(base())
    assert all(values in (found[0], found[-1]) for values in found)


def test_tokenizer_and_adapter_are_of_one_save(tmp_path):
    """As `evaluate` and `generate` read them: the tokenizer first."""

    def save(version: str, folder: Path) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = version
        with one_save(folder) as beside:
            adapted(version).save_pretrained(beside)
            tokenizer.save_pretrained(beside)

    save("old", tmp_path / "old")
    found = []
    for _ in crashes(lambda: save("new", tmp_path / "out"), tmp_path / "old", tmp_path / "out"):
        tokenizer = load_tokenizer("nowhere", str(tmp_path / "out"))
        model = PeftModel.from_pretrained(base(), tmp_path / "out")
        assert model.peft_config["default"].domains == DOMAINS[tokenizer.chat_template]
        found.append(tokenizer.chat_template)
    assert set(found) == {"old", "new"}


# ---- what is full or read-only --------------------------------------------------------------------------------------


def test_any_error_of_the_disk_is_one_line_and_leaves_the_old_adapter_or_the_new(saved, tmp_path):
    new = adapted("new")
    messages = set()
    for step in range(1, 200):
        folder = tmp_path / str(step)
        shutil.copytree(saved["old"], folder)
        with pytest.MonkeyPatch.context() as patch:
            crash = Crash(patch, step, OSError(errno.ENOSPC, "No space left on device"))
            try:
                new.save_pretrained(folder)
            except NotSavedError as error:
                messages.add(str(error).replace(str(folder), "out"))
        if not crash.over:
            break
        assert outputs(PeftModel.from_pretrained(base(), folder)) in (outputs(adapted("old")), outputs(new))
    full, interrupted = sorted(messages, reverse=True)[:1], [text for text in messages if "interrupted" in text]
    assert full == [
        "nothing could be saved to 'out' (No space left on device). Free some space, or save elsewhere. What was "
        "saved there before is whole."
    ]
    assert len(interrupted) == 1 and "finish_save" in interrupted[0]


def test_a_file_that_cannot_grow(saved, tmp_path):
    """safetensors has its own error for the system's."""
    shutil.copytree(saved["old"], tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    new = adapted("new")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(NotSavedError, match=r"nothing could be saved to '.*out' \(File too large\)\. .*is whole"):
            new.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outputs(PeftModel.from_pretrained(base(), tmp_path / "out")) == outputs(adapted("old"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in saved["old"].iterdir()}


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As a user who may not write there: root may write everywhere."""
    folder.chmod(0o555)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_folder_that_is_read_only(saved, tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    out = tmp_path / "out"
    shutil.copytree(saved["old"], out)
    new = adapted("new")
    with read_only(out), pytest.raises(NotSavedError, match=r"'.*out' \(Permission denied\)\. Give a folder that may"):
        new.save_pretrained(out)
    with pytest.MonkeyPatch.context() as patch:
        replace, left = os.replace, [1]

        def once(*args: Any) -> None:
            if not left:
                raise Killed
            left.pop()
            replace(*args)

        patch.setattr(
            os, "replace", lambda *args: once(*args) if ".unfinished-save" in str(args[0]) else replace(*args)
        )
        with pytest.raises(Killed):
            new.save_pretrained(out)
    with read_only(out), pytest.raises(NotSavedError, match=r"was interrupted, and cannot be finished \(Permission"):
        PeftModel.from_pretrained(base(), out)
    assert outputs(PeftModel.from_pretrained(base(), out)) == outputs(new)


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_damaged_weights_are_never_loaded(saved, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(saved["old"], out)
    whole = (out / WEIGHTS).read_bytes()
    chance = random.Random(0)
    flips = [chance.randrange(8 * len(whole)) for _ in range(60)] + [chance.randrange(8 * 600) for _ in range(20)]
    for bit in flips:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (out / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged, or of another adapter: its SHA"):
            PeftModel.from_pretrained(base(), out)
    for length in (0, 1, 7, 8, 600, len(whole) // 2, len(whole) - 1):
        (out / WEIGHTS).write_bytes(whole[:length])
        for load in (
            lambda: PeftModel.from_pretrained(base(), out),
            lambda: PeftModel.from_pretrained(base(), tmp_path, subfolder="out"),
            lambda: AlterConfig.from_pretrained(out),
        ):
            with pytest.raises(ValueError, match="is damaged"):
                load()
    (out / WEIGHTS).write_bytes(whole)
    assert outputs(PeftModel.from_pretrained(base(), out)) == outputs(adapted("old"))


def test_the_checksum_is_that_of_the_file(saved, tmp_path):
    config = json.loads((saved["old"] / CONFIG).read_text())
    assert config["weights_sha256"] == sha256(saved["old"] / WEIGHTS) and len(config["weights_sha256"]) == 64
    assert AlterConfig.from_pretrained(saved["old"]).weights_sha256 is None  # of that file alone
    model = PeftModel.from_pretrained(base(), saved["old"])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)
    AlterConfig(r=2).save_pretrained(tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / CONFIG).read_text())["weights_sha256"] is None


@pytest.mark.parametrize("value", [None, ...], ids=["null", "missing"])
def test_weights_without_a_checksum_load(saved, tmp_path, value):
    shutil.copytree(saved["old"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    del config["weights_sha256"]
    if value is None:
        config["weights_sha256"] = None
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config))
    weights = {name: 2 * tensor for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
    save_file(weights, tmp_path / "out" / WEIGHTS)
    PeftModel.from_pretrained(base(), tmp_path / "out")


def test_what_else_lies_in_the_folder_stays(saved, tmp_path):
    shutil.copytree(saved["old"], tmp_path / "out")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "a.txt").write_text("mine")
    adapted("new").save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "notes" / "a.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "README.md", "notes"}


def test_arguments_by_position_are_those_by_name(tmp_path, monkeypatch):
    names = ("default", "later")
    model = adapted("new", names)
    (tmp_path / "adapter_model.bin").touch()  # beside an adapter that is not saved
    model.save_pretrained(tmp_path, True, ["later"])
    assert (tmp_path / "later" / WEIGHTS).exists() and not (tmp_path / WEIGHTS).exists()
    with pytest.raises(ValueError, match="is a pickle"):
        model.save_pretrained(tmp_path, True, ["default"])

    def save(folder: Path) -> None:
        raise AssertionError("another process than the main one saves")

    monkeypatch.setattr(saving, "one_save", save)
    model.save_pretrained(tmp_path / "other", True, None, "auto", False)
