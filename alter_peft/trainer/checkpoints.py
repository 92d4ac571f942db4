# SPDX-License-Identifier: Apache-2.0
"""Where a trainer writes, and which checkpoint it goes on from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import logging
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from alter_peft.registration import NAME
from alter_peft.tuner.files import check_weights
from alter_peft.tuner.saving import finish_saves_of


logger = logging.get_logger(__name__)
# what transformers leaves in a checkpoint that it writes when the process is asked to end
_IN_PROGRESS = "checkpoint-is-incomplete.txt"

# the name of the last run, beside its checkpoints, and in each its own: a time in UTC, so that later ones sort behind
_STARTED, _RUN = ".last-fresh-start", ".run"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    prefix, _, step = folder.name.rpartition("-")
    return prefix == PREFIX_CHECKPOINT_DIR and step.isdigit()


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written: the trainer's state comes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return not (checkpoint / _IN_PROGRESS).exists()


def last_checkpoint(folder: Path) -> Path | None:
    """
    The whole checkpoint of the highest step of the last run. Times of files, which a copy changes, say nothing.

    Without the name of the last run (a copy of the checkpoints alone) it is the latest that they name.
    """
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint(path) and is_whole(path)]
    runs = {path: _text(path / _RUN) or "" for path in found}
    last = _text(folder / _STARTED)
    of_last = [path for path in found if last is None or runs[path] == last]
    return max(of_last, key=lambda path: (runs[path], int(path.name.rpartition("-")[2])), default=None)


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def name_run(folder: Path, checkpoint: Path) -> None:
    """Write into a checkpoint of which run it is."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / _RUN).write_text(_text(folder / _STARTED) or "", encoding="utf-8")


def branch_off(folder: Path, checkpoint: Path) -> None:
    """Note that a run goes on from a checkpoint that isn't the last one: what came after that is of another run."""
    if checkpoint.absolute() == (last_checkpoint(folder) or folder).absolute():
        return
    _begin(folder)
    if checkpoint.absolute().parent == folder.absolute():
        name_run(folder, checkpoint)


def _begin(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STARTED).write_text(datetime.now(UTC).isoformat(), encoding="utf-8")


def checkpoint_to_resume(given: Any, folder: Path) -> str | None:
    """
    The checkpoint to go on from, or `None` for a fresh start.

    Args:
        given: `resume_from_checkpoint`: a path, `True` for the last one in `folder`, `False` or `None`.
        folder: where the trainer's checkpoints are.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    text = str(given).lower()
    if given is None or text in ("", "false", "none"):
        return None
    if text == "true":
        last = last_checkpoint(folder)
        if last is None:
            raise ValueError(
                f"`resume_from_checkpoint` is {given}, but '{folder}' has no whole checkpoint of the last run. Start "
                "without it, or give the path of a checkpoint."
            )
    else:
        last = Path(given)
        if not is_whole(last):
            why = f"but there is no {TRAINER_STATE_NAME}" if last.is_dir() else "but there is no such folder"
            if (last / TRAINER_STATE_NAME).exists():
                why = "whose writing was interrupted"
            known = last_checkpoint(folder)
            fix = (
                f"The last whole one is '{known}'"
                if known
                else f"'{folder}' has no whole one either: start without it"
            )
            raise ValueError(f"`resume_from_checkpoint` is '{given}', {why}: it is no whole checkpoint. {fix}.")
    check_adapters(last)
    return str(last)


def check_adapters(folder: Path) -> None:
    """Raise a `ValueError` if the weights of an ALTER adapter in a checkpoint are not those that were written."""
    finish_saves_of(folder)
    for config in (folder / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))):
        found = json.loads(config.read_bytes()) if config.is_file() else {}
        if found.get("peft_type") == NAME:
            check_weights(str(config.parent), None, found.get("weights_sha256"))


def check_folders(args: Any) -> None:
    """
    Say what is in the folders of a run already.

    Args:
        args: an `UnlearnConfig`.

    Raises:
        ValueError: nothing can be written to one of them.
    """
    if not args.should_save:
        return
    output, checkpoints = Path(args.output_dir), Path(args.checkpoint_dir)
    _check_writable("output_dir", output)
    if args.save_strategy != "no":
        _check_writable("checkpoint_dir", checkpoints)
    adapters = [
        path.parent for path in (output / CONFIG_NAME, *sorted(output.glob(f"*/{CONFIG_NAME}"))) if path.is_file()
    ]
    if adapters:
        names = ", ".join(f"'{path}'" for path in adapters)
        logger.warning(
            f"`output_dir` holds an adapter already ({names}). It stays as it is until this run saves its own there, "
            "which takes its place."
        )


def start_afresh(folder: Path) -> None:
    """Note that a run starts where there may be checkpoints of an earlier one, and say so if there are."""
    last = last_checkpoint(folder)
    if last is not None:
        logger.warning(
            f"'{folder}' holds checkpoints of an earlier run, up to {last.name}, but this one starts afresh. Its own "
            "take the place of those of the same step. To go on instead: `resume_from_checkpoint=True`."
        )
    _begin(folder)


def _check_writable(name: str, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{name}` is '{folder}', but that is a file. Give a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{name}` is '{folder}', but nothing can be written there ({error.strerror or error}). Give another one."
        ) from error
    finally:
        if name != "output_dir":  # which the trainer makes in any case
            for path in made:
                if path.is_dir():
                    path.rmdir()


def link_files(names: list[Path], source: Path, target: Path) -> None:
    """The files of one folder in another one, too, at no cost where the file system can."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copy(source / name, target / name)
