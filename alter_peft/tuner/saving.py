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
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from alter_peft.registration import NAME


BEING_WRITTEN, UNFINISHED = ".saving-", ".unfinished-save"
MARK = ".mark"  # ends the name of a file that stands in the place of a config while other files are moved
REMOVED = ".removed"  # lists files of the folder that the new ones make wrong
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
        ours = any(config.peft_type == NAME for config in self.peft_config.values())
        is_nested = folder.name.startswith(BEING_WRITTEN)
        if not ours or is_nested or folder.is_file() or not kwargs.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        for name in kwargs.get("selected_adapters") or self.peft_config:
            refuse_pickle_on_save(folder if name == "default" else folder / name)
        with one_save(folder) as beside:
            keep_card(folder, beside)
            save(self, str(beside), *args, **kwargs)

    return save_pretrained


def keep_card(folder: Path, beside: Path) -> None:
    """Copy the card of a folder to where the new files are written, for PEFT continues one that is there."""
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", beside)


def finish_save(folder: Path) -> None:
    """
    Move the files of a save into place that was interrupted while it did so; does nothing if there is none.

    Raises:
        NotSavedError: they cannot be moved, as in a folder that is read-only.
    """
    marks, heads, _ = _unfinished(folder)
    if len(marks) < len(heads):  # with all of them nothing has changed yet
        _finish(folder)


def _unfinished(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The files that are to be moved: marks, configs, the rest."""
    files = sorted(file for file in (folder / UNFINISHED).rglob("*") if file.is_file())
    marks = [file for file in files if file.suffix == MARK]
    heads = [file for file in files if file.name == CONFIG_NAME or file == folder / UNFINISHED / MODEL_CONFIG_NAME]
    return marks, heads, [file for file in files if file not in (*marks, *heads) and file.name != REMOVED]


def _finish(folder: Path) -> None:
    left = folder / UNFINISHED
    try:
        marks, heads, others = _unfinished(folder)
        for file in marks:  # those in the folder itself come first
            _move(file, folder / file.relative_to(left).with_suffix(""))
        if (left / REMOVED).is_file():
            for name in json.loads((left / REMOVED).read_text()):
                (folder / name).unlink(missing_ok=True)
            (left / REMOVED).unlink()
        for file in (*others, *heads):
            _move(file, folder / file.relative_to(left))
        shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise NotSavedError(
            f"a save to '{folder}' was interrupted, and cannot be finished ({error.strerror or error}). "
            f"{how_to_finish(folder)}"
        ) from error


def finish_saves_of(adapter: str | os.PathLike[str]) -> None:
    """As `finish_save`, of the folder that an adapter lies in: its own, or the one above for a named adapter."""
    folder = Path(adapter)
    if not folder.is_dir():
        return
    finish_save(folder)
    if (folder.absolute().parent / UNFINISHED / folder.absolute().name).is_dir():
        finish_save(folder.absolute().parent)


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
    if (beside / MODEL_CONFIG_NAME).is_file():
        removed = _of_other_models(beside.parent, {file.name for file in beside.iterdir()})
        (beside / REMOVED).write_text(json.dumps(removed))
    for file in beside.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def _of_other_models(folder: Path, new: set[str]) -> list[str]:
    """Sharded and single weights have different names, and an adapter is loaded instead of the model around it."""
    names = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
    found = [file.name for file in folder.iterdir() if file.name in names or _OF_MODELS.fullmatch(file.name)]
    return [name for name in found if name not in new]


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(file, place)
    except FileNotFoundError:  # another process that loads the adapter has moved it
        if not place.exists():
            raise
