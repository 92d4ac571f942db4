# SPDX-License-Identifier: Apache-2.0
"""What an adapter's folder or repository on the Hub holds beside the weights: the format, the file type, the card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, metadata_load
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from transformers.utils.hub import has_file

from alter_peft.registration import PREFIX

from .saving import how_to_finish, sha256


# Raised when an adapter written by this version would be misread by an older one.
# 2: with `router="entropy"` the retain expert has no output of the router, and acts at weight 1.
# 3: the router may have a hidden layer (`router_hidden_size`), and another half-life by default.
FORMAT_VERSION = 3

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


def check_weights(model_id: str, subfolder: str | None, expected: str | None, **hub: Any) -> Path | None:
    """
    The file of the weights beside a config, if it is there and was looked at.

    Args:
        expected: `weights_sha256` of the config; `None` checks nothing.
        hub: as for `refuse_pickle_on_load`.

    Raises:
        ValueError: they are not those that it was saved with.
    """
    if expected is None:
        return None
    folder = Path(model_id, subfolder or "")
    if re.fullmatch("[0-9a-f]{64}", expected) is None:
        raise ValueError(
            f"`weights_sha256` in {folder / CONFIG_NAME} is {expected!r}, but must be the SHA-256 of "
            f"{SAFETENSORS_WEIGHTS_NAME}, 64 hexadecimal digits. {how_to_finish(folder)}"
        )
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not folder.is_dir():
        try:
            weights = Path(hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub))
        except OSError:  # no access, or none there: PEFT says so itself
            return None
    if not weights.is_file():  # a config alone
        return None
    if (found := sha256(weights)) != expected:
        raise ValueError(
            f"{weights} is damaged, or of another adapter: its SHA-256 is {found}, but `weights_sha256` in "
            f"{CONFIG_NAME} is {expected!r}. Get both files again from where they were saved; if the weights were "
            "changed on purpose, set `weights_sha256` to null."
        )
    return weights


def check_complete(weights: Path | None, modules: Any, tokens: Any) -> None:
    """Raise a `ValueError` if the weights have nothing of the modules or tokens that a config says were trained."""
    if weights is None or (modules is None and tokens is None):
        return
    with safe_open(weights, "pt") as file:
        keys = list(file.keys())
    others = [key for key in keys if f".{PREFIX}" not in key]
    # PEFT adds the usual names of a classifier's head, of which a model has one
    if modules and not any(f".{name}." in key for name in modules for key in others):
        raise ValueError(
            f"`modules_to_save` is {modules!r}, but {weights} has no weights of them. Correct it in {CONFIG_NAME}."
        )
    if tokens is not None and not any("trainable_tokens" in key for key in keys):
        raise ValueError(
            f"`trainable_token_indices` is {tokens!r}, but {weights} has none. Remove it from {CONFIG_NAME}."
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
