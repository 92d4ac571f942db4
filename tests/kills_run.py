# SPDX-License-Identifier: Apache-2.0
"""What test_kills.py kills: a process that has imported everything, and forks one that does what it is told.

An order is a line of JSON on stdin; the answers are lines of `pid N`, `phase NAME TIME`, `result JSON`, `exit STATUS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import datasets
import torch
from conftest import make_llama, make_tokenizer
from peft import PeftModel
from trainer_setup import make_trainer

from alter_peft.evaluation.loading import load_tokenizer
from alter_peft.trainer.checkpoints import last_checkpoint


# two runs whose adapters differ in their weights, their config and their tokenizer
VERSIONS: dict[str, dict[str, Any]] = {"a": {"lora_alpha": 8}, "b": {"lora_alpha": 16}}
ANSWERS = os.dup(1)


def say(*words: Any) -> None:
    os.write(ANSWERS, (" ".join(map(str, words)) + "\n").encode())


def phase(name: str) -> None:
    say("phase", name, time.monotonic())


def train(folder: str, version: str, repo: str, resume: bool = False) -> None:
    """A run that saves each step, then the adapter, and pushes it."""
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    torch.manual_seed(0)
    out = Path(folder) / "out"
    phase("start")
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 1000 + ord(version)
    trainer = make_trainer(
        out, tokenizer, adapter=VERSIONS[version], max_steps=3, save_strategy="steps", save_steps=1,
        seed=ord(version), push_to_hub=True, hub_model_id=repo, hub_token="hf_token", hub_strategy="end",
    )  # fmt: skip
    prepare = trainer.prepare

    def prepared() -> None:
        phase("phase I")
        prepare()
        phase("training")

    trainer.prepare = prepared  # type: ignore[method-assign]
    found = resume and last_checkpoint(Path(trainer.args.checkpoint_dir)) is not None
    trainer.train(resume_from_checkpoint=found)
    trainer.args.push_to_hub = False  # by itself, below
    phase("saving")
    trainer.save_model()
    phase("pushing")
    trainer.push_to_hub()
    phase("end")
    say("result", json.dumps({"resumed": found}))


def look(folder: str, known: dict[str, str]) -> None:
    """Which of the known adapters is loaded from a folder; `nothing` if there is none."""
    try:
        found = loaded(folder)
    except ValueError as error:
        if "Can't find 'adapter_config.json'" not in str(error):
            raise
        say("result", json.dumps("nothing"))
        return
    far = {name: distance(found, loaded(place)) for name, place in known.items()}
    same = [name for name, difference in far.items() if not difference]
    say("result", json.dumps(same[0] if same else f"a mixture: {far}"))


def distance(
    found: tuple[dict[str, Any], dict[str, torch.Tensor]], other: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """What two adapters differ in."""
    (config, weights), (expected, others) = found, other
    differ: dict[str, Any] = {
        name: (value, expected.get(name)) for name, value in config.items() if value != expected.get(name)
    }
    if weights.keys() != others.keys():
        return {**differ, "weights": sorted(weights.keys() ^ others.keys())}
    furthest = max(float((weights[name] - others[name]).abs().max()) for name in weights)
    return differ | ({"weights": furthest} if furthest > 1e-6 else {})


def loaded(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:  # first, as `evaluate` does
        tokenizer = repr(load_tokenizer(folder, folder).model_max_length)
    except ValueError:
        tokenizer = "none"
    model = PeftModel.from_pretrained(make_llama(len(make_tokenizer())), folder)
    config = {name: repr(value) for name, value in model.peft_config["default"].to_dict().items()}
    config["tokenizer"] = tokenizer
    config["target_modules"] = repr(sorted(model.peft_config["default"].target_modules))
    return config, {name: weight for name, weight in model.state_dict().items() if ".alter_" in name}


def main() -> None:
    torch.set_num_threads(1)
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                {"train": train, "look": look}[order.pop("do")](**order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        say("pid", child)
        say("exit", os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
