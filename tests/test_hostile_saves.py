# SPDX-License-Identifier: Apache-2.0
"""What loading does with an unfinished save that came with a folder: it changes nothing outside, and says so."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from test_saving import CONFIG, WEIGHTS, Killed, adapted, base, outputs

from alter_peft import AlterConfig
from alter_peft.evaluation.loading import load_model, loaded
from alter_peft.tuner import saving
from alter_peft.tuner.saving import MARK, RECORD, UNFINISHED, NotSavedError, finish_save, one_save


Change = Callable[[Path, Path], Any]


def interrupted(folder: Path, names: tuple[str, ...] = ("default",)) -> Path:
    """A folder with the old adapter where a save of the new one was killed after its step; what is left of it."""
    adapted("old", names).save_pretrained(folder)
    replace = os.replace

    def once(source: Any, target: Any) -> None:
        if Path(source).suffix != MARK and UNFINISHED in str(source):
            raise Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", once)
        with pytest.raises(Killed):
            adapted("new", names).save_pretrained(folder)
    return folder / UNFINISHED


def recorded(**changes: Any) -> Change:
    def change(left: Path, outside: Path) -> None:
        found = json.loads((left / RECORD).read_text())
        (left / RECORD).write_text(json.dumps(found | changes))

    return change


def remove_absolute(left: Path, outside: Path) -> None:
    recorded(removed=[str(outside / WEIGHTS)])(left, outside)


def link_the_folder(left: Path, outside: Path) -> None:
    (left / "later").mkdir()
    (left / "later" / "secret").write_text("theirs")
    (left.parent / "later").symlink_to(outside)


def link_the_folder_left(left: Path, outside: Path) -> None:
    (left / "later").symlink_to(outside)


def link_the_file_left(left: Path, outside: Path) -> None:
    (left / WEIGHTS).unlink()
    (left / WEIGHTS).symlink_to(outside / WEIGHTS)


def link_the_file(left: Path, outside: Path) -> None:
    (left.parent / WEIGHTS).unlink()
    (left.parent / WEIGHTS).symlink_to(outside / WEIGHTS)


def link_the_record(left: Path, outside: Path) -> None:
    (left / RECORD).rename(outside / "record")
    (left / RECORD).symlink_to(outside / "record")


def link_all(left: Path, outside: Path) -> None:
    left.rename(outside / "left")
    left.symlink_to(outside / "left")


def hide(left: Path, outside: Path) -> None:
    (left / ".git" / "hooks").mkdir(parents=True)
    (left / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh")


HOSTILE: dict[str, tuple[Change, str]] = {
    "parent": (recorded(removed=["../outside/secret"]), r"its \.record would remove \['\.\./outside/secret'\]"),
    "absolute": (remove_absolute, r"its \.record would remove \['/"),
    "other-names": (recorded(removed=["notes.txt", 3]), r"its \.record would remove \['notes\.txt', 3\]"),
    "no-names": (recorded(removed="model.safetensors"), r"its \.record would remove 'model\.safetensors'"),
    "linked-folder": (link_the_folder, r"out/later' is a symbolic link, which no save goes through"),
    "linked-folder-left": (link_the_folder_left, r"unfinished-save/later' is a symbolic link"),
    "linked-file": (link_the_file, r"out/adapter_model\.safetensors' is a symbolic link"),
    "linked-file-left": (link_the_file_left, r"unfinished-save/adapter_model\.safetensors' is a symbolic link"),
    "linked-record": (link_the_record, r"\.record' is a symbolic link"),
    "linked-whole": (link_all, r"\.unfinished-save' is a symbolic link"),
    "hidden": (hide, r"\.unfinished-save/\.git' is hidden"),
    "no-record": (lambda left, outside: (left / RECORD).unlink(), r"it has no \.record"),
    "broken-record": (lambda left, outside: (left / RECORD).write_text("{"), r"its \.record is none"),
    "listed-record": (lambda left, outside: (left / RECORD).write_text("[]"), r"its \.record is none"),
}


def state(*folders: Path) -> dict[Path, Any]:
    found = [path for folder in folders for path in (folder, *sorted(folder.rglob("*")))]
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in found
    }


@pytest.mark.parametrize("how", HOSTILE)
def test_nothing_is_touched(how, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    left = interrupted(out)
    outside.mkdir()
    (out / "notes.txt").write_text("mine")
    for name in ("secret", WEIGHTS):
        (outside / name).write_text("mine")
    change, message = HOSTILE[how]
    change(left, outside)
    before = state(out, outside)
    for load in (
        lambda: PeftModel.from_pretrained(base(), out),
        lambda: AlterConfig.from_pretrained(out),
        lambda: finish_save(out),
        lambda: loaded("model", str(out), load_model),
        lambda: adapted("new").save_pretrained(out),
    ):
        with pytest.raises((NotSavedError, ValueError), match=message):
            load()
        assert state(out, outside) == before


def test_one_that_was_begun_elsewhere_is_not_finished_by_loading(tmp_path):
    interrupted(tmp_path / "there")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "there", out)
    before = state(out)
    with pytest.raises(NotSavedError, match=r"but not here: the folder was copied or downloaded .* finish_save\(Path"):
        PeftModel.from_pretrained(base(), out)
    assert state(out) == before
    finish_save(out)
    (tmp_path / "there").rename(tmp_path / "moved")
    for folder in (out, tmp_path / "moved"):
        assert outputs(PeftModel.from_pretrained(base(), folder)) == outputs(adapted("new"))


def test_a_save_through_a_link_is_refused_before_it_changes_anything(tmp_path):
    """Of a named adapter whose folder is a link; a file that is a link is replaced."""
    names, out = ("default", "later"), tmp_path / "out"
    adapted("old", names).save_pretrained(out)
    (out / "later").rename(tmp_path / "elsewhere")
    (out / "later").symlink_to(tmp_path / "elsewhere")
    before = state(tmp_path)
    with pytest.raises(NotSavedError, match=r"out/later' is a symbolic link, .*Nothing was changed"):
        adapted("new", names).save_pretrained(out)
    assert state(tmp_path) == before
    (out / WEIGHTS).rename(tmp_path / "weights")
    (out / WEIGHTS).symlink_to(tmp_path / "weights")
    adapted("new").save_pretrained(out)
    assert not (out / WEIGHTS).is_symlink() and (tmp_path / "weights").read_bytes() == before[out / WEIGHTS]


def test_it_may_be_finished_by_another_process_meanwhile(tmp_path, monkeypatch):
    """At each look at the disk that a load takes."""
    looks = [(saving, "_tree"), (saving, "_check"), (saving, "_move"), (Path, "read_bytes"), (Path, "is_symlink")]
    for owner, name in looks:
        folder = tmp_path / name
        interrupted(folder)
        known, done = getattr(owner, name), threading.Event()

        def call(*args: Any, known: Any = known, done: Any = done, folder: Any = folder, **kwargs: Any) -> Any:
            if not done.is_set():
                done.set()
                finish_save(folder)
            return known(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            model = PeftModel.from_pretrained(base(), folder)
        assert done.is_set() and outputs(model) == outputs(adapted("new"))
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


# ---- files that are read-only ---------------------------------------------------------------------------------------


def test_a_card_and_files_that_are_read_only(tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    out = tmp_path / "out"
    adapted("old").save_pretrained(out)
    for path in (out, *out.iterdir()):
        path.chmod(0o777 if path.is_dir() else 0o444)
    new, user = adapted("new"), os.geteuid()
    os.seteuid(user or 65534)  # root may write everywhere
    try:
        new.save_pretrained(out)
        with one_save(out) as beside:
            (beside / "notes.txt").write_text("mine")
            (beside / "notes.txt").chmod(0o444)
    finally:
        os.seteuid(user)
    assert outputs(PeftModel.from_pretrained(base(), out)) == outputs(new)
    assert (out / "README.md").stat().st_mode & 0o200 and not (out / "notes.txt").stat().st_mode & 0o200
