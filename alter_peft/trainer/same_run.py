# SPDX-License-Identifier: Apache-2.0
"""What a run was begun with, in each of its checkpoints, and whether another one may go on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from enum import Enum
from inspect import get_annotations
from pathlib import Path
from typing import Any

from accelerate import logging
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from alter_peft.reading.values import shown
from alter_peft.words import counted

from .config import AlterUnlearnConfig, UnlearnConfig
from .weight_bytes import weight_bytes


logger = logging.get_logger(__name__)
BEGUN_WITH = ".begun-with.json"  # in each checkpoint; it is never pushed: a hash of a few rows can be guessed at
SETS = ("train_dataset", "retain_dataset", "calibration_dataset")
BATCH = 1000  # rows that are in memory at once
SAMPLE = 256  # numbers of each tensor that stand for it
# Own options that another part of a run may have: they say how long it is, where it writes and what it costs. Of batch
# and accumulation the product over all processes has to stay, since the pairs of a step are drawn by it.
FREE = {
    "num_train_epochs", "stopping_tolerance", "lr_scheduler_type", "gradient_checkpointing", "checkpoint_dir",
    "per_device_train_batch_size",
}  # fmt: skip
# Inherited options that must stay: the order of the rows, what rows are made of, and what the optimizer's saved state
# would put back without a word (so it does with learning rates)
KEPT = (
    "seed", "dataloader_drop_last", "max_length", "completion_only_loss", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
# What training or saving writes into the config of an adapter
WRITTEN = {
    "alter_peft_version", "format_version", "weights_sha256", "peft_version", "inference_mode", "auto_mapping",
    "base_model_name_or_path", "revision", "task_type", "peft_type",
}  # fmt: skip


Difference = tuple[str, str] | None  # what is now, and after "begun" what was then


def begun_with(
    args: Any,
    model: nn.Module,
    given: Mapping[str, Dataset | None],
    prepared: Mapping[str, Dataset],
    reference: Any,
) -> dict[str, Any]:
    """
    What a run depends on, as JSON has it: nothing of it changes while it trains.

    Args:
        args: an `UnlearnConfig`.
        model: before anything is trained; where ZeRO-3 has split it, all processes call this together.
        given: argument -> the rows as they were given.
        prepared: argument -> the same as token ids and labels.
        reference: `reference_model`.
    """
    found = {
        "kind": _adapter(model).get("peft_type"),
        "arguments": _arguments(args),
        "step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "rows": {name: _rows(rows) for name, rows in given.items()},
        "adapter": {name: value for name, value in _adapter(model).items() if name not in WRITTEN},
        "model": {"name": _name(model), "sha256": _weights(model)},
        "reference": None if reference is None else _name(reference),
        "tokens": {name: _rows(rows.select_columns(["input_ids", "labels"])) for name, rows in prepared.items()},
    }
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def write_begun_with(checkpoint: Path, begun: Mapping[str, Any]) -> None:
    """Into a checkpoint that is being written."""
    (checkpoint / BEGUN_WITH).write_text(json.dumps(begun), encoding="utf-8")


def difference(checkpoint: Path, now: Mapping[str, Any]) -> str | None:
    """
    What keeps a run from going on from a checkpoint, as one line with the fix; `None` if nothing does.

    Args:
        now: what `begun_with` gives.
    """
    file, unchecked = checkpoint / BEGUN_WITH, "that rows, options and model are the same is not checked."
    if not file.exists():
        logger.warning(
            f"'{checkpoint}' does not say what it was begun with (it is of an older version, or from the Hub): "
            f"{unchecked}"
        )
        return None
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning(f"'{file}', what the checkpoint was begun with, cannot be read ({error}): {unchecked}")
        return None
    if not _is_whole(begun):
        logger.warning(f"'{file}', what the checkpoint was begun with, is damaged or incomplete: {unchecked}")
        return None
    found = next((pair for compare in COMPARED if (pair := compare(now, begun))), None)
    if found is None:
        return None
    return (
        f"{found[0]}, but the checkpoint '{checkpoint}' was begun {found[1]}. Go on with what it was begun with, or "
        "start afresh: without `resume_from_checkpoint`, and with another `output_dir` to keep what is there."
    )


def _is_whole(begun: Any) -> bool:
    """Whether it has all that is compared, as `begun_with` writes it."""

    def of_rows(rows: Any) -> bool:
        return isinstance(rows, dict) and isinstance(rows.get("rows"), int) and "sha256" in rows

    if not isinstance(begun, dict) or not {"kind", "reference"} <= begun.keys():
        return False
    parts = [begun.get(name) for name in ("arguments", "rows", "adapter", "model", "tokens")]
    return (
        isinstance(begun.get("step"), int)
        and all(isinstance(part, dict) for part in parts)
        and {"name", "sha256"} <= begun["model"].keys()
        and all(rows is None or of_rows(rows) for rows in begun["rows"].values())
        and all(map(of_rows, begun["tokens"].values()))
    )


def _kinds(now: Any, begun: Any) -> Difference:
    if now["kind"] == begun["kind"]:
        return None
    kinds = [f"an adapter of the kind {one['kind']}" if one["kind"] else "no adapter" for one in (now, begun)]
    return f"`peft_config` makes {kinds[0]}", f"with {kinds[1]}"


def _values(now: Mapping[str, Any], begun: Mapping[str, Any]) -> Difference:
    for name, value in now.items():
        if name in begun and begun[name] != value:
            was = begun[name]
            if isinstance(value, list) and isinstance(was, list):  # what both have may be long
                value, was = ([x for x in one if x not in other] or one for one, other in ((value, was), (was, value)))
            return f"`{name}` is {shown(value)}", f"with {shown(was)}"
    return None


def _step(now: Any, begun: Any) -> Difference:
    if now["step"] == begun["step"]:
        return None
    return (
        f"`per_device_train_batch_size` times `gradient_accumulation_steps` times the processes is {now['step']}",
        f"with {counted(begun['step'], 'forget row')} a step, by which the rows of each step are drawn",
    )


def _sets(now: Any, begun: Any) -> Difference:
    for name, rows in now["rows"].items():
        was = begun["rows"].get(name)
        if rows == was:
            continue
        then = "without any" if was is None else f"with {_count(was)}"
        if rows is None:
            return f"`{name}` is not given", then
        if was is not None and rows["rows"] == was["rows"]:
            return f"`{name}` has {_count(rows)}", "with as many of other content, or in another order"
        return f"`{name}` has {_count(rows)}", then
    return None


def _model(now: Any, begun: Any) -> Difference:
    one, other = now["model"], begun["model"]
    if one["sha256"] == other["sha256"]:
        return None
    was = (
        shown(other["name"]) if one["name"] != other["name"] else "other weights of this name, or in another precision"
    )
    return f"`model` is {shown(one['name'])}", f"with {was}"


def _tokens(now: Any, begun: Any) -> Difference:
    name = next((name for name, rows in now["tokens"].items() if rows != begun["tokens"].get(name)), None)
    if name is None:
        return None
    return f"`{name}` gives other tokens than at the start: another tokenizer or chat template", "with others"


# in this order: what comes first may be why the rest differs
COMPARED: tuple[Callable[[Any, Any], Difference], ...] = (
    _kinds,
    lambda now, begun: _values(now["arguments"], begun["arguments"]),
    _step,
    _sets,
    lambda now, begun: _values(now["adapter"], begun["adapter"]),
    _model,
    lambda now, begun: _values({"reference_model": now["reference"]}, {"reference_model": begun["reference"]}),
    _tokens,
)


def _count(rows: Mapping[str, Any]) -> str:
    return counted(rows["rows"], "row")


def _arguments(args: Any) -> dict[str, Any]:
    of_alter = get_annotations(AlterUnlearnConfig) if isinstance(args, AlterUnlearnConfig) else {}
    names = [name for name in {**get_annotations(UnlearnConfig), **of_alter} if name not in FREE]
    found = {name: getattr(args, name) for name in [*names, *KEPT]} | {"forget_loss_kwargs": args.loss_options}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, set) else value


def _adapter(model: nn.Module) -> dict[str, Any]:
    """The options of the adapter that is trained; none if all weights are."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapters[0]]
    found = {name: _plain(value) for name, value in config.to_dict().items()}
    if found.get("entropy_quantile") is not None:  # phase I measures it
        del found["entropy_threshold"]
    return found


def _rows(rows: Dataset | None) -> dict[str, Any] | None:
    """How many there are, and a hash of them in their order."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(BATCH):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode(errors="surrogatepass"))
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _name(model: Any) -> str:
    """What a model was loaded by; a folder by its whole path."""
    name = model if isinstance(model, str) else str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _weights(model: nn.Module) -> str:
    """
    A hash of some numbers of each tensor of the base model and of the adapters that act beside the trained one.

    Their names are those without any wrapper, so that they are the same whatever an adapter adapts.
    """
    trained = _trained(model)
    names = [name for name in model.state_dict() if name not in trained]
    found: dict[str, bytes] = {}
    for name, shape, dtype, parts in weight_bytes(model, names, SAMPLE):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = b"".join([f"{plain} {[*shape]} {dtype} ".encode(), *(part.tobytes() for part in parts)])
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(found[name])
    return digest.hexdigest()


def _trained(model: nn.Module) -> set[str]:
    """The tensors of an adapted model that are of the trained adapter, or of one that does not act."""
    if not isinstance(model, PeftModel):
        return set()
    skipped = set(model.peft_config) - set(model.active_adapters[1:])
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = {"prompt_encoder."} | {
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    for name in model.state_dict():
        parts = name.split(".")
        layer = next((end for end in range(len(parts) - 1, 0, -1) if f"{'.'.join(parts[:end])}." in inside), None)
        if layer is not None and parts[layer] not in ("base_layer", "original_module") and skipped & {*parts[layer:]}:
            found.add(name)
    return found
