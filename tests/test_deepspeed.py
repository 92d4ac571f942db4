# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed itself, ZeRO-2 and ZeRO-3, on two processes with gloo: they do what one process does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_llama
from deepspeed_run import started_from_clusters, train_and_save, trainer_from
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_setup import adapter_state, central_difference
from transformers import PreTrainedTokenizerBase, TrainerState

from alter_peft import AlterConfig, AlterUnlearnTrainer


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"


def state_of(trainer: AlterUnlearnTrainer, expert: str) -> float:
    """How many steps the optimiser has made on an expert."""
    name = next(name for name, _ in trainer.model.named_parameters() if name.endswith(f".{expert}"))
    return trainer.optimizer.state[trainer.model.get_parameter(name)]["step"].item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """
    What one process does from `base/` and `start/`, where the two processes start too, in `one-adapter/`.

    `one-by-difference/` is another, whose structural term has the gradient that it has under ZeRO-3.
    """
    place = tmp_path_factory.mktemp("deepspeed")
    tokenizer.save_pretrained(place / "tokenizer")
    make_llama(len(tokenizer)).save_pretrained(place / "base")
    torch.manual_seed(0)
    config = AlterConfig(init_weights=False, entropy_quantile=0.6, r=4, domains=["home", "bread"])
    get_peft_model(make_llama(len(tokenizer)), config).save_pretrained(place / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache-of-one")
        trainer = trainer_from(place, place / "one", tokenizer)
        torch.save(adapter_state(trainer), place / "before.pt")
        train_and_save(trainer, place / "one-adapter")
        assert trainer.state.global_step == state_of(trainer, "retain") > state_of(trainer, "forget_1")  # which rests
        with central_difference():
            train_and_save(trainer_from(place, place / "one", tokenizer), place / "one-by-difference")
        found = started_from_clusters(trainer_from(place, place / "one", tokenizer))
        torch.save(found, place / "clusters.pt")
    return place


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def two(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The folder of `deepspeed_run.py`, run by two processes."""
    place = folder / f"zero{request.param}"
    place.mkdir()
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command += ["--config_file", str(CONFIGS / f"zero{request.param}.yaml"), "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]
    tests = Path(__file__).parent
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tests / "deepspeed_run.py"), str(place)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return place


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def of_one(folder: Path, two: Path) -> Path:
    """What one process trained as the two have."""
    return folder / ("one-adapter" if two.name == "zero2" else "one-by-difference")


def test_two_processes_under_deepspeed_do_what_one_does(folder, two):
    """Experts and A that rest, the structural term, checkpointing, KL to the base, the distance from the level."""
    place = of_one(folder, two)
    one = load_file(place / "adapter_model.safetensors")
    found = load_file(two / "trajectory" / "adapter_model.safetensors")
    # under ZeRO-3 the structural term is a central difference, which magnifies rounding
    assert_close(found, one, tolerance=1e-4)
    before = torch.load(folder / "before.pt")
    for part in (".alter_A.", ".forget_0", ".forget_1", ".retain"):
        keys = [key.rsplit(".", 1) for key in one if part in f"{key}."]
        moved = [(one[f"{a}.{b}"] - before[f"{a}.default.{b}"]).abs().max().item() for a, b in keys]
        assert max(moved) > 1e-3, part
    places = two / "trajectory", place
    logs = [TrainerState.load_from_json(place / "state.json").log_history for place in places]
    same = ("loss", "loss/forget", "loss/retain", "loss/structural")
    assert len(logs[1]) > 8
    for of_two, of_single in zip(*(log[:-1] for log in logs), strict=True):
        assert [of_two[name] for name in same] == pytest.approx([of_single[name] for name in same], rel=1e-2)
    gaps = [float((place / "gap.txt").read_text()) for place in places]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3) and gaps[1] > 0.1


def test_an_adapter_of_deepspeed_loads_in_one(folder, two, tokenizer):
    ids = torch.tensor([tokenizer("Where does Alice live? Alice lives in")["input_ids"]])
    logits = [
        PeftModel.from_pretrained(make_llama(len(tokenizer)), place).eval()(ids).logits
        for place in (two / "trajectory", of_one(folder, two))
    ]
    scale = logits[1].abs().max().item()
    torch.testing.assert_close(*logits, atol=1e-3 * scale, rtol=0.0)


def test_deepspeed_resumes_within_an_epoch(two):
    whole, rest = (load_file(two / f"{name}" / "adapter_model.safetensors") for name in ("trajectory", "rest-adapter"))
    assert_close(rest, whole, tolerance=1e-7)


def test_phase_one_under_deepspeed(folder, two):
    """Where ZeRO-3 has split the base, all processes look at the data together; cluster start included."""
    one, main, other = (torch.load(f) for f in (folder / "clusters.pt", two / "clusters-0.pt", two / "clusters-1.pt"))
    assert any(value.any() for name, value in one.items() if ".forget_0" in name)
    assert_close(other, main, tolerance=0.0)
    # a regression, whose solver magnifies rounding
    fitted = [name for name in one if ".alter_router." in name]
    assert len(fitted) == 4 and all(main.pop(name).any() and one.pop(name).any() for name in fitted)
    assert_close(main, one, tolerance=1e-6)
