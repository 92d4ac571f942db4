# SPDX-License-Identifier: Apache-2.0
"""Whether a score of two results was measured in the same way, by the settings that each was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alter_peft.evaluation.attacks import LEARNING_RATE
from alter_peft.evaluation.results import Result
from alter_peft.evaluation.tasks.choices import task_name
from alter_peft.evaluation.tasks.tofu import TOFU_METRICS

from .summary import attack_of, is_attack


OF_TOFU = ("split", "retain_rows", "rows")
OF_ANSWERS = ("answered", "max_new_tokens")
GRID = "processes"  # a setting that every result of a grid has
# metrics of the true answers alone, on which the length and number of the model's own have no bearing
OF_TRUE_ANSWERS = (
    "probability", "normalized_probability", "truth_ratio", "exact_memorization", "extraction_strength", "min_k",
    "astray", "min_k_auc", "loss_auc", "loss_per_byte_auc", "membership_auc",
)  # fmt: skip


def difference(key: str, own: Result, oracle: Result) -> str | None:
    """Why a score of a model is not to be compared with that of an oracle; `None` if both were measured alike."""
    wanted, found = settings_of(key, own), settings_of(key, oracle)
    for name, value in wanted.items():
        if name not in found:
            return f"an oracle's result does not say its `{name}`"
        if found[name] != value:
            return f"`{name}` is {value!r} for the model, and {found[name]!r} for an oracle"
    return None


def settings_of(key: str, result: Result) -> dict[str, Any]:
    """The settings that a score depends on, by name; those that the result does not have are left out."""
    settings = _of_grid(result.settings) if GRID in result.settings else result.settings
    name, _, metric = key.rpartition("/")
    if metric in ("acc", "acc_norm"):
        return _task(name, settings)
    found = {part: settings[part] for part in ("bf16",) if part in settings}
    if "as_chat" in settings:
        found["as_chat"] = settings["as_chat"] is not False  # a tokenizer with a template asks in chats by default
    if metric not in OF_TRUE_ANSWERS:
        found |= {part: settings[part] for part in OF_ANSWERS if part in settings}
    files = {one: Path(path).name for one, _, path in (entry.partition("=") for entry in settings.get("sets", ()))}
    forget = sorted(settings.get("forget") or ["forget"])
    if is_attack(key):
        found["forget"] = forget
        asked = [*forget, *(["holdout"] if attack_of(key) in ("membership", "relearning") else [])]
        if attack_of(key) == "relearning" and "relearning_rate" in settings:
            found["relearning_rate"] = settings["relearning_rate"]
    else:
        found["is_forget"] = name in forget or name in ("paraphrased", "after 200 tokens")
        asked = [name]
    if any(one in files for one in asked):
        found["sets"] = {one: files[one] for one in asked if one in files}
    elif "tofu" in settings and all(one in TOFU_METRICS or one == "utility" for one in asked):
        found["sets"] = "TOFU's" if settings["tofu"] else "none"
        found |= {part: settings[part] for part in OF_TOFU if part in settings}
    return found


def _of_grid(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a grid as `alter-peft evaluate` calls them."""
    tofu = settings.get("data") if settings.get("books") is None else None
    usual: dict[str, Any] = {"as_chat": None, "bf16": True, "sets": [], "forget": []}
    return {**usual, "tofu": tofu, "relearning_rate": LEARNING_RATE, **settings}


def _task(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """How a multiple-choice task was asked; a task in a group of the harness has the settings of the group."""
    tasks = settings.get("tasks", [])
    found: dict[str, dict[str, Any]] = {
        task_name(task): tasks[task] if isinstance(tasks, dict) else settings for task in tasks
    }
    of_task = found.get(name) or (next(iter(found.values())) if found else {})
    return {part: of_task[part] for part in ("limit", "form") if part in of_task}
