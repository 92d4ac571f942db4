# SPDX-License-Identifier: Apache-2.0
"""What `--retain` and `--corpus` say: rows of one's own, or those that `retain_auto` finds."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets

from alter_peft.retain_rows import retain_parts
from alter_peft.words import counted


AUTO = "auto"
RETAIN = (
    "Rows to keep: as of --forget; or auto: general text that ships with alter-peft (about 230 everyday questions), "
    "and of --corpus what is like the rows to forget."
)
CORPUS = (
    "With --retain auto: text that the model was trained on, as of --forget; of it the nearest rows to those to "
    "forget are kept, but none that says the same."
)


def check_retain(retain: str | None, corpus: str | None) -> None:
    """Raise a `ValueError` if there is nothing to retain, or a corpus for nothing."""
    if retain is None:
        raise ValueError(
            "`--retain` is missing: without rows to keep, a model forgets more than it shall. Give rows like those to "
            f"forget, or `--retain {AUTO}`: general text of ours, with which it still speaks; what it knows close to "
            "the rows to forget suffers, unless you also give `--corpus`, text that it was trained on."
        )
    if corpus is not None and retain != AUTO:
        raise ValueError(f"`--corpus` is {corpus!r}, but rows are taken of it with `--retain {AUTO}` alone. Set that.")


def found_rows(forget: Dataset, corpus: Dataset | None) -> tuple[Dataset, str]:
    """
    The rows of `--retain auto`, and a line that says where they are from.

    Raises:
        ValueError: rows in which nothing like them can be found.
    """
    try:
        general, near = retain_parts(forget, corpus)
    except ValueError as error:
        raise ValueError(f"`--retain` is {AUTO!r}: {error}") from error
    line = f"--retain: {counted(len(general), 'row')} of general text"
    if near is None:
        return general, line
    line += f", and {len(near)} of --corpus like the rows to forget"
    return concatenate_datasets([general, near]), line
