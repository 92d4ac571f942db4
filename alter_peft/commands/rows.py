# SPDX-License-Identifier: Apache-2.0
"""The files and Hub data sets that `alter-peft unlearn` is given."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError


LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(name: str, source: str) -> Dataset:
    loader = LOADERS.get(Path(source).suffix)
    if loader is not None and not Path(source).is_file():
        raise ValueError(f"`{name}` is {source!r}, but there is no such file.")
    try:
        if loader is None:
            return load_dataset(source, split="train")
        return load_dataset(loader, data_files=source, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        known = ", ".join(LOADERS)
        raise ValueError(
            f"`{name}` is {source!r}, which could not be read ({error.__cause__ or error}). Give a file ({known}) or "
            "the name of a Hub data set with a split 'train'."
        ) from error
