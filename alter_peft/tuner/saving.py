# SPDX-License-Identifier: Apache-2.0
"""A save in one step: after a crash at any moment a folder has what it had, or all that is new (docs/saving.md).

All files are written to a folder inside, and once they are whole a mark takes the place of the config, which a loader
reads first: that is the step. Then they are moved into place, the config last, and whoever finds a mark, because the
process was killed, moves what is left (`finish_save`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from alter_peft.registration import NAME


BEING_WRITTEN, UNFINISHED = ".saving-", ".unfinished-save"
MARK = ".mark"  # ends the name of a file that stands in the place of a config while other files are moved
# says where the save was begun, and lists the files of the folder that the new ones make wrong
RECORD = ".record"
# in the place of the checksum in such a config
NO_CHECKSUM = "none, since a save was interrupted here"
# what another saved model would leave, or what would be loaded in its stead
_OF_MODELS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


class NotSavedError(OSError):
    """A save failed: what was in the folder before is there as it was."""


@contextmanager
def one_save(folder: Path) -> Iterator[Path]:
    """
    A folder to write to, whose files come into another one in one step at the end.

    Other files of that folder stay as they are, but for weights of a whole model that would be loaded in the stead of
    those of the new one. One process may save into a folder at a time.

    Raises:
        NotSavedError: the disk is full, nothing may be written there, or another error of the file system.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finish_save(folder)
        for left in (*folder.glob(f"{BEING_WRITTEN}*"), folder / UNFINISHED):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(dir=folder, prefix=BEING_WRITTEN))
        beside.chmod(stat.S_IMODE(folder.stat().st_mode))
        try:
            yield beside
            _prepare(beside)
            _refuse_links(folder, [place for file in _tree(beside) for place in _place(folder, beside, file).parents])
            os.rename(beside, folder / UNFINISHED)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        _finish(folder)


@contextmanager
def explained(folder: Path, kept: str = "What was saved there before is whole.") -> Iterator[None]:
    """Turns errors of writing into a `NotSavedError` of one line, which ends with what was kept."""
    try:
        yield
    except (NotSavedError, ConnectionError, TimeoutError):
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch.save put the system's error into errors of their own
        system = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(system[1]) if system else None
        if number is None and not re.search("PytorchStreamWriter|iostream", str(error)):
            raise
        reason = str(error) if number is None else os.strerror(number)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        fix = "Free some space, or save elsewhere." if full else "Give a folder that may be written to."
        raise NotSavedError(f"nothing could be saved to '{folder}' ({reason}). {fix} {kept}") from error


def refuse_pickle_on_save(folder: Path) -> None:
    """Raise a `ValueError` if PEFT has just written, or left, a pickle of weights in an adapter's folder."""
    if (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder / WEIGHTS_NAME} is a pickle, which ALTER refuses: whoever loads one runs what is in it. Remove "
            "it, and save with `safe_serialization=True` (the default)."
        )


def save_through(save: Callable[..., None]) -> Callable[..., None]:
    """PEFT's `save_pretrained`, which writes one file after the other into place, in one step where ALTER is saved."""

    @wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        given = signature(save).bind(self, save_directory, *args, **kwargs).arguments
        given |= given.get("kwargs", {})  # of a function around PEFT's that names no arguments
        ours = any(config.peft_type == NAME for config in self.peft_config.values())
        is_nested = folder.name.startswith(BEING_WRITTEN)
        if not ours or is_nested or folder.is_file() or not given.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        for name in given.get("selected_adapters") or self.peft_config:
            refuse_pickle_on_save(folder if name == "default" else folder / name)
        with one_save(folder) as beside:
            keep_card(folder, beside)
            save(self, str(beside), *args, **kwargs)

    return save_pretrained


def keep_card(folder: Path, beside: Path) -> None:
    """Copy the card of a folder to where the new files are written, for PEFT continues one that is there."""
    if (folder / "README.md").is_file():
        shutil.copyfile(folder / "README.md", beside / "README.md")  # without its mode: it may be read-only


def finish_save(folder: Path, is_begun_here: bool = False) -> None:
    """
    Move the files of a save into place that was interrupted while it did so; does nothing if there is none.

    Args:
        is_begun_here: whether to refuse a save that was begun elsewhere, and came with the folder.

    Raises:
        NotSavedError: they cannot be moved, as in a folder that is read-only, or they are not what a save leaves.
            Then nothing was changed.
    """
    marks, heads, _ = _unfinished(folder)
    if len(marks) >= len(heads):  # with all of them nothing has changed yet
        return
    try:
        _check(folder, is_begun_here)
    except FileNotFoundError:
        if _unfinished(folder)[1]:
            raise _refused(folder, f"it has no {RECORD}") from None
        return  # another process has finished it
    _finish(folder)


def _tree(left: Path) -> list[Path]:
    """All that is in a folder, what is above first. Another process may remove it meanwhile."""
    return [Path(place, name) for place, folders, files in os.walk(left) for name in sorted((*folders, *files))]


def _place(folder: Path, left: Path, file: Path) -> Path:
    """Where a file of an unfinished save comes to."""
    place = folder / file.relative_to(left)
    return place.with_suffix("") if file.suffix == MARK else place


def _unfinished(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files that are to be moved: marks, configs, the rest."""
    left = folder / UNFINISHED
    files = [file for file in _tree(left) if file.is_file() and file != left / RECORD]
    marks = [file for file in files if file.suffix == MARK]
    heads = [file for file in files if file.name == CONFIG_NAME or file == left / MODEL_CONFIG_NAME]
    return marks, heads, [file for file in files if file not in (*marks, *heads)]


def _refused(folder: Path, why: str) -> NotSavedError:
    return NotSavedError(
        f"'{folder / UNFINISHED}' is not what an interrupted save leaves: {why}. Nothing was changed. If the folder "
        "came from elsewhere, do not trust it; else remove that."
    )


def _refuse_links(folder: Path, paths: list[Path]) -> None:
    links = [path for path in paths if path.is_relative_to(folder) and path != folder and path.is_symlink()]
    if links:
        raise NotSavedError(
            f"'{links[0]}' is a symbolic link, which no save goes through. Nothing was changed. If the folder came "
            "from elsewhere, do not trust it; else remove the link."
        )


def _check(folder: Path, is_begun_here: bool) -> None:
    """Raise a `NotSavedError` if finishing a save could change anything outside the folder, or what no save does."""
    left = folder / UNFINISHED
    _refuse_links(folder, [left, left / RECORD])
    try:
        record = json.loads((left / RECORD).read_bytes())
        inode, removed = record["inode"], record["removed"]
    except (ValueError, KeyError, TypeError):
        raise _refused(folder, f"its {RECORD} is none") from None
    others = removed if not isinstance(removed, list) else [name for name in removed if not _is_of_model(name)]
    if others:
        raise _refused(folder, f"its {RECORD} would remove {others!r}")
    found = [file for file in _tree(left) if file != left / RECORD]
    hidden = [file for file in found if file.name.startswith(".")]
    if hidden:
        raise _refused(folder, f"'{hidden[0]}' is hidden")
    places = [_place(folder, left, file) for file in found] + [folder / name for name in removed]
    _refuse_links(folder, [*found, *places])
    if is_begun_here and inode != left.stat().st_ino:
        raise NotSavedError(
            f"a save to '{folder}' was interrupted, but not here: the folder was copied or downloaded since. If you "
            f"trust where it came from, finish it. {how_to_finish(folder)}"
        )


def _is_of_model(name: Any) -> bool:
    """Whether that is the name of a file that a save may remove."""
    of_adapter = name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    return isinstance(name, str) and (of_adapter or _OF_MODELS.fullmatch(name) is not None)


def _finish(folder: Path) -> None:
    left = folder / UNFINISHED
    try:
        marks, heads, others = _unfinished(folder)
        try:
            removed = json.loads((left / RECORD).read_bytes())["removed"]
        except FileNotFoundError:  # another process that loads the adapter has finished it
            return
        for file in marks:  # what is in the folder itself first, as `_tree` has it
            _move(file, _place(folder, left, file))
        for name in removed:
            (folder / name).unlink(missing_ok=True)
        for file in (*others, *heads):
            _move(file, _place(folder, left, file))
        shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise NotSavedError(
            f"a save to '{folder}' was interrupted, and cannot be finished ({error.strerror or error}). "
            f"{how_to_finish(folder)}"
        ) from error


def finish_saves_of(adapter: str | os.PathLike[str]) -> None:
    """
    As `finish_save` of a save that was begun here, of the folder that an adapter lies in: its own, or the one above
    for a named adapter.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        return
    finish_save(folder, is_begun_here=True)
    if (folder.absolute().parent / UNFINISHED / folder.absolute().name).is_dir():
        finish_save(folder.absolute().parent, is_begun_here=True)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def how_to_finish(folder: Path) -> str:
    """What to do about a save that was interrupted."""
    call = f"from alter_peft.tuner.saving import finish_save; finish_save(Path({str(folder.absolute())!r}))"
    return f'Save again, or finish it where it may be written: python -c "from pathlib import Path; {call}"'


def _read(config: Path) -> dict[str, Any]:
    """A config, or nothing where it is none."""
    try:
        found = json.loads(config.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _prepare(beside: Path) -> None:
    """Puts a mark beside each config, and everything onto the disk."""
    for config in (*beside.rglob(CONFIG_NAME), *beside.glob(MODEL_CONFIG_NAME)):
        found = _read(config)
        place = beside.parent / config.parent.relative_to(beside)
        if found.get("peft_type") == NAME:
            mark = {**found, "weights_sha256": NO_CHECKSUM}
        else:  # a loader without this package shows what it does not know
            field = "peft_type" if config.name == CONFIG_NAME else "model_type"
            mark = {field: f"{NO_CHECKSUM}. {how_to_finish(place)}"}
        config.with_name(config.name + MARK).write_text(json.dumps(mark), encoding="utf-8")
    removed = []
    if (beside / MODEL_CONFIG_NAME).is_file():
        removed = _of_other_models(beside.parent, {file.name for file in beside.iterdir()})
    # a folder that is copied or downloaded has another inode
    (beside / RECORD).write_text(json.dumps({"inode": beside.stat().st_ino, "removed": removed}))
    for file in beside.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _of_other_models(folder: Path, new: set[str]) -> list[str]:
    """Sharded and single weights have different names, and an adapter is loaded instead of the model around it."""
    return [file.name for file in folder.iterdir() if _is_of_model(file.name) and file.name not in new]


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, place)
    except FileNotFoundError:  # another process that loads the adapter has moved it
        if not place.exists():
            raise
