# SPDX-License-Identifier: Apache-2.0
"""What an adapter's folder or repository on the Hub holds beside the weights: the format, the file type, the card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, metadata_load
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.hub import has_file


# Raised when an adapter written by this version would be misread by an older one.
# 2: with `router="entropy"` the retain expert has no output of the router, and acts at weight 1.
FORMAT_VERSION = 2

LOADING = """Importing `alter_peft` is what tells PEFT of this kind of adapter (`pip install alter-peft`). Without it,
every way to load the adapter in PEFT and in transformers ends in `KeyError: 'ALTER'`:

```python
import alter_peft  # noqa: F401  registers ALTER with PEFT
{loading}
```
"""
_HEADING = "## How to Get Started with the Model"
_GENERIC = LOADING.format(
    loading="""from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this adapter's folder or repository")"""
)


def check_format_version(version: int, package_version: str | None) -> None:
    """Raise a `ValueError` if an adapter's format is no version that this package can read."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`format_version` is {version!r}, but must be a positive integer.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`format_version` is {version}: this adapter was written by alter-peft {package_version or '(unknown)'}, "
            f"but this version of alter-peft reads formats up to {FORMAT_VERSION}. Upgrade it: "
            "pip install -U alter-peft."
        )


def refuse_pickle_on_save(folder: Path) -> None:
    """Raise a `ValueError` if PEFT has just written, or left, a pickle of weights in an adapter's folder."""
    if (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder / WEIGHTS_NAME} is a pickle, which ALTER refuses: whoever loads one runs what is in it. Remove "
            "it, and save with `safe_serialization=True` (the default)."
        )


def refuse_pickle_on_load(model_id: str, subfolder: str | None, **hub: Any) -> None:
    """Raise a `ValueError` if the weights that PEFT would load are a pickle: before it opens them.

    `hub` holds `revision`, `token`, `cache_dir`, `repo_type` and `local_files_only`, as for `has_file`. Costs one
    request for an adapter on the Hub, none for a folder.
    """
    safe, pickle = (f"{subfolder}/{name}" if subfolder else name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    try:
        is_pickle = not has_file(model_id, safe, **hub) and has_file(model_id, pickle, **hub)
    except OSError:  # no access: PEFT says so itself when it asks for the weights
        return
    if is_pickle:
        raise ValueError(
            f"The weights at {model_id!r} are a pickle ({pickle}), which ALTER refuses: loading one can run code. Ask "
            f"for {safe}, or convert it where it is trusted: safetensors.torch.save_file(torch.load({WEIGHTS_NAME!r}, "
            f"weights_only=True), {SAFETENSORS_WEIGHTS_NAME!r})."
        )


def explain_loading(folder: Path) -> None:
    """Write into the card that PEFT has made how the adapter is loaded; other READMEs stay as they are.

    PEFT puts one card beside the folder of a named adapter, and into that of `"default"`.
    """
    for readme in (folder / "README.md", folder.parent / "README.md"):
        if not readme.is_file() or (metadata_load(readme) or {}).get("library_name") != "peft":
            continue
        card = ModelCard.load(readme)
        card.data.tags = sorted({*(card.data.tags or []), "alter"})
        if "import alter_peft" not in card.text:
            before, heading, after = card.text.partition(_HEADING)
            card.text = f"{before}{heading or '## Use'}\n\n{_GENERIC}{after}"
        card.save(readme)
        return


@contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose files are moved into another one at the end, so that none is ever half written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        yield Path(beside)
        for file in sorted(Path(beside).rglob("*"), reverse=True):  # the config last: it says that all is there
            if file.is_file():
                place = folder / file.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
