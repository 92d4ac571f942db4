# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import golden
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file

from alter_peft import AlterConfig, __version__
from alter_peft.peft_import import BEFORE_PEFT, OLDEST_PEFT
from alter_peft.tuner.files import FORMAT_VERSION
from alter_peft.tuner.saving import sha256


ROOT = Path(__file__).parents[1]
FOLDERS = sorted(golden.FIXTURES.glob("format-*/*"))


def edited(folder: Path, target: Path, remove: tuple[str, ...] = (), **changes) -> Path:
    """A copy of a golden adapter whose adapter_config.json is changed."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    saved = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in saved.items() if key not in remove}))
    return target


# ---- golden adapters ------------------------------------------------------------------------------------------------


def test_every_format_version_has_its_golden_adapters():
    expected = {
        f"format-{version}/{name}"
        for name in golden.ADAPTERS
        for version in range(golden.FIRST_VERSION.get(name, 1), FORMAT_VERSION + 1)
    }
    assert {str(folder.relative_to(golden.FIXTURES)) for folder in FOLDERS} == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_golden_adapter_says_what_it_said_when_it_was_written(folder):
    model = PeftModel.from_pretrained(golden.make_base(), folder)
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    torch.testing.assert_close(torch.tensor(golden.logits(model)), expected, rtol=1e-4, atol=1e-4)
    # and every tensor in it has a say, so that none can be left out or mistaken for another
    own = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in model.named_parameters()}
    for key in load_file(folder / "adapter_model.safetensors"):
        kept = own[key].detach().clone()
        own[key].data.zero_()
        assert (torch.tensor(golden.logits(model)) - expected).abs().max() > 1e-3, key
        own[key].data.copy_(kept)


def test_loading_and_saving_again_keeps_format_version_and_weights(tmp_path):
    for folder in FOLDERS:
        target = tmp_path / folder.parent.name / folder.name
        PeftModel.from_pretrained(golden.make_base(), folder).save_pretrained(target)
        saved, again = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, target))
        for config in (saved, again):
            config["target_modules"] = sorted(config["target_modules"])
        saved.pop("weights_sha256", None)  # golden adapters of before it was written have none
        assert again.pop("weights_sha256") == sha256(target / "adapter_model.safetensors")
        added = {name: again[name] for name in again.keys() - saved.keys()}  # fields that came after it was written
        old = AlterConfig(format_version=saved["format_version"], router=saved["router"])
        assert added == {name: getattr(old, name) for name in added}
        assert again == {**saved, **added}
        before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, target))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


# ---- the format's version -------------------------------------------------------------------------------------------


def test_a_saved_config_says_which_package_and_format_it_is_of(tmp_path):
    AlterConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["format_version"], saved["alter_peft_version"]) == (FORMAT_VERSION, __version__)


def test_a_missing_format_version_counts_as_the_first(tmp_path):
    folder = edited(FOLDERS[0], tmp_path / "old", remove=("format_version", "alter_peft_version"))
    model = PeftModel.from_pretrained(golden.make_base(), folder)
    assert model.peft_config["default"].format_version == 1
    expected = torch.tensor(json.loads((FOLDERS[0] / "logits.json").read_text()))
    torch.testing.assert_close(torch.tensor(golden.logits(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("load", [PeftConfig.from_pretrained, AlterConfig.from_pretrained], ids=["peft", "alter"])
def test_a_newer_format_is_refused_with_the_fix(tmp_path, load):
    newer = {"format_version": FORMAT_VERSION + 1, "alter_peft_version": "9.8"}
    folder = edited(FOLDERS[0], tmp_path / "new", **newer)
    message = rf"`format_version` is {FORMAT_VERSION + 1}: .* written by alter-peft 9\.8, .* pip install -U alter-peft"
    with pytest.raises(ValueError, match=message):
        load(folder)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(golden.make_base(), folder)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_a_format_version_that_is_none_is_refused(version):
    with pytest.raises(ValueError, match=r"`format_version` is .*, but must be a positive integer"):
        AlterConfig(format_version=version)


# ---- unknown keys ---------------------------------------------------------------------------------------------------


def test_unknown_keys_are_handled_as_peft_does(tmp_path):
    """LoRA's warning, and the rest is loaded."""
    LoraConfig(r=4).save_pretrained(tmp_path / "lora")
    edited(tmp_path / "lora", tmp_path / "lora_new", some_new_key=3)
    folder = edited(FOLDERS[0], tmp_path / "new", some_new_key=3)
    for place, name in ((tmp_path / "lora_new", "LoraConfig"), (folder, "AlterConfig")):
        with pytest.warns(UserWarning, match=rf"Unexpected keyword arguments \['some_new_key'\] for class {name}"):
            config = PeftConfig.from_pretrained(place)
        assert type(config).__name__ == name and not hasattr(config, "some_new_key")
    with pytest.warns(UserWarning, match="some_new_key"):
        model = PeftModel.from_pretrained(golden.make_base(), folder)
    expected = torch.tensor(json.loads((FOLDERS[0] / "logits.json").read_text()))
    torch.testing.assert_close(torch.tensor(golden.logits(model)), expected, rtol=1e-4, atol=1e-4)


def test_a_new_key_does_not_hide_that_the_format_is_newer(tmp_path):
    folder = edited(FOLDERS[0], tmp_path / "new", some_new_key=3, format_version=FORMAT_VERSION + 1)
    with pytest.warns(UserWarning, match="some_new_key"), pytest.raises(ValueError, match="`format_version` is"):
        PeftConfig.from_pretrained(folder)


# ---- the supported versions -----------------------------------------------------------------------------------------


def pinned(name: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pairs = (line.split("==") for line in lines if line)
    return {package: Version(version) for package, version in pairs}


def test_the_declared_ranges_end_at_the_versions_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for package in ("peft", "transformers", "trl"):
        bounds = {bound.operator: Version(bound.version) for bound in declared[package]}
        assert bounds[">="] == oldest[package] <= newest[package]
        assert newest[package] in declared[package]
    bounds = {bound.operator: Version(bound.version) for bound in declared["peft"]}
    assert (bounds[">="], bounds["<"]) == (OLDEST_PEFT, Version(f"{BEFORE_PEFT.major}.{BEFORE_PEFT.minor}"))
