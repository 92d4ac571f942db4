# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub: what is wrong with it is said before a training, and after one nothing is lost by it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, is_offline_mode
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


# what is in `output_dir` and not to be delivered: checkpoints, if they are inside, at any depth
CHECKPOINTS = (f"{PREFIX_CHECKPOINT_DIR}-*", f"*/{PREFIX_CHECKPOINT_DIR}-*")


class NotPushedError(OSError):
    """A push failed; what was to be pushed is saved."""


class NoRepositoryError(ValueError):
    """The repository on the Hub could neither be found nor made."""


def upload_command(args: Any, repository: str | None = None) -> str:
    """The command that pushes `output_dir` later, without the checkpoints that may be inside."""
    words = ["hf", "upload", repository or args.hub_model_id or "USER/NAME", str(args.output_dir)]
    output, checkpoints = Path(args.output_dir).resolve(), Path(args.checkpoint_dir).resolve()
    if checkpoints.is_relative_to(output):
        words += [f"--exclude={pattern}" for pattern in CHECKPOINTS]
    return shlex.join(words)


def check_push(args: Any) -> None:
    """
    Raise a `ValueError` if it is known before any training that nothing can be pushed.

    Args:
        args: an `UnlearnConfig`.
    """
    if not args.push_to_hub or args.process_index != 0:
        return
    later = f"or leave `push_to_hub` out, and push later: `{upload_command(args)}`."
    if is_offline_mode():
        raise ValueError(f"`push_to_hub` is True, but HF_HUB_OFFLINE forbids the Hub. Unset that variable, {later}")
    if (args.hub_token or get_token()) is None:
        raise ValueError(
            "`push_to_hub` is True, but there is no login for the Hub. Log in by `hf auth login`, give a token that "
            f"may write as `hub_token` or in the variable HF_TOKEN, {later}"
        )


def no_repository(args: Any, error: Any) -> NoRepositoryError:
    """What is said where the repository could neither be found nor made."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    return NoRepositoryError(
        f"`push_to_hub` is True, but the repository {name!r} (`hub_model_id`) could not be made on the Hub, or "
        f"reached ({_reason(error)}). Check the network, the name and the token (`hf auth login`), or leave "
        f"`push_to_hub` out, and push later: `{upload_command(args)}`."
    )


def not_pushed(args: Any, repository: str | None, error: Any) -> NotPushedError:
    """What is said where a push failed after a save."""
    return NotPushedError(
        f"what was trained is saved in '{args.output_dir}', but could not be pushed to the Hub ({_reason(error)}). "
        f"Push it later: `hf auth login`, if need be, and `{upload_command(args, repository)}`."
    )


def _reason(error: Any) -> str:
    """The error and, as of an upload in parts, what it came from."""
    cause: Any = error.__cause__ if isinstance(error, NoRepositoryError) else error
    chain = [cause] if cause.__cause__ is None else [cause, cause.__cause__]
    lines = [line for one in chain for line in f"{type(one).__name__}: {one}".splitlines()]
    lines = [line for line in lines if "more information" not in line]
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
