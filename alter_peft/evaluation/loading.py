# SPDX-License-Identifier: Apache-2.0
"""How a model is loaded that is measured, asked or made to forget: as it is, or by merging an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from alter_peft.tuner.saving import finish_saves_of


class Merge(NamedTuple):
    """
    A model that is an adapter, merged into its base.

    kind: the adapter's type, of PEFT.
    base: folder or Hub id of its base model.
    """

    kind: str
    base: str

    def __str__(self) -> str:
        return f"is an adapter ({self.kind}): merged into its base model '{self.base}'"


def merge_of(name: str, source: str) -> Merge | None:
    """
    What option `name` is if it names the folder or the Hub id of an adapter; `None` if it is a model of its own.

    Raises:
        ValueError: an ALTER adapter, which is worn and not merged; or an adapter on an adapter.
    """
    file = _adapter_config(source)
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        found = Merge(str(config["peft_type"]), str(config["base_model_name_or_path"] or ""))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{name}` is {source!r}, whose adapter_config.json is that of no adapter ({error!r})."
        ) from None
    if found.kind == "ALTER":
        raise ValueError(
            f"`{name}` is {source!r}, an ALTER adapter. Give its base model as `{name}` ({found.base!r}); `alter-peft "
            "evaluate` and `generate` take the adapter as `--adapter`."
        )
    if not found.base or _adapter_config(found.base) is not None:
        of = "is an adapter, too" if found.base else "is not named"
        raise ValueError(
            f"`{name}` is {source!r}, an adapter whose base model {of}. Merge them, and give what is saved."
        )
    return found


def _adapter_config(source: str) -> str | None:
    """Where the adapter's configuration is, if that is an adapter. No request is made for a folder."""
    try:
        finish_saves_of(source)
        return find_adapter_config_file(source)
    except OSError:  # neither a folder nor on the Hub: loading it says so
        return None


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """A causal LM; an adapter of another kind than ALTER is merged into its base, and the model is named after it."""
    merge = merge_of("model", source)
    if merge is None:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    try:
        adapted: Any = AutoPeftModelForCausalLM.from_pretrained(source, **options)
        model = adapted.merge_and_unload().requires_grad_(True)  # as a model that is loaded
    except (AttributeError, NotImplementedError) as error:  # of a kind that changes no weights, as prompt tuning
        raise ValueError(f"an adapter of kind {merge.kind} is not merged") from error
    # what is trained on it names this as its base: by a path that is nowhere looked up
    model.name_or_path = model.config._name_or_path = str(Path(source).absolute()) if Path(source).is_dir() else source
    return model  # type: ignore[no-any-return]


def load(folder: Path | str) -> PreTrainedModel:
    """A model in float32, in which small steps are not lost, on this process's own device."""
    model: Any = load_model(str(folder), dtype=torch.float32)
    return model.to(PartialState().device).eval()  # type: ignore[no-any-return]


def loaded(name: str, source: str, read: Callable[[str], Any]) -> Any:
    """What option `name` is read as, from a folder or the Hub; a `ValueError` if it can't be."""
    try:
        finish_saves_of(source)
        return read(source)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{name}` is {source!r}, which could not be loaded ({error}). Give a folder or a Hub id."
        ) from error


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer that an adapter was trained with, if it is beside it, or else the model's.

    Its chat template may have variables of the training's (`chat_template_kwargs`). Where the model is itself an
    adapter without a tokenizer, it is that of its base.
    """
    if adapter is not None:
        loaded("adapter", adapter, finish_saves_of)  # a tokenizer is of one save with its adapter
    if adapter is not None and (not Path(adapter).is_dir() or (Path(adapter) / "tokenizer_config.json").is_file()):
        try:
            return AutoTokenizer.from_pretrained(adapter)
        except (OSError, ValueError):
            pass  # an adapter of the Hub that has none
    merge = merge_of("model", model)
    source = merge.base if merge is not None and not has_file(model, "tokenizer_config.json") else model
    return loaded("model", source, AutoTokenizer.from_pretrained)  # type: ignore[no-any-return]
