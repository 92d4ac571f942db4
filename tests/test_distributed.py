# SPDX-License-Identifier: Apache-2.0
"""Several processes: DDP and FSDP2 on gloo do what one process does, and what cannot work says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import make_llama
from distributed_run import CLUSTERS, TRAJECTORY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, StateDictType
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainer_setup import adapter_state, central_difference, make_trainer
from transformers import PreTrainedTokenizerBase, TrainerState

from alter_peft import AlterConfig
from alter_peft.trainer import distributed
from alter_peft.trainer.distributed import by_main_process, is_sharded, local_shard, set_up_distributed, shard_like
from alter_peft.trainer.isolation import parameter_groups, skip_groups


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate_configs"
LAUNCHES: dict[str, list[str]] = {
    "ddp": ["--multi_gpu"],
    "fsdp": [
        "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
        "--fsdp_reshard_after_forward", "true", "--fsdp_state_dict_type", "FULL_STATE_DICT",
        "--fsdp_cpu_ram_efficient_loading", "true", "--fsdp_sync_module_states", "true",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """
    What one process finds: `one/`, and its adapter in `adapter-of-one/`, from which the two processes go on.

    `adapter-by-difference/` is another, whose structural term has the gradient that it has under FSDP2.
    """
    place = tmp_path_factory.mktemp("distributed")
    tokenizer.save_pretrained(place / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache-of-one")
        trainer = make_trainer(place / "one", tokenizer, adapter={"init_weights": False}, **TRAJECTORY)
        torch.save(adapter_state(trainer), place / "before.pt")
        trainer.train()
        trainer.save_model(place / "adapter-of-one")
        trainer.state.save_to_json(place / "adapter-of-one" / "state.json")
        with central_difference():
            trainer = make_trainer(place / "one", tokenizer, adapter={"init_weights": False}, **TRAJECTORY)
            trainer.train()
        trainer.save_model(place / "adapter-by-difference")
        trainer.state.save_to_json(place / "adapter-by-difference" / "state.json")
        clusters = make_trainer(place / "one", tokenizer, **CLUSTERS)
        clusters.prepare()
        torch.save({**adapter_state(clusters), "targets": clusters.measured.targets}, place / "clusters.pt")
    return place


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def two(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The folder of `distributed_run.py`, run by two processes."""
    place = folder / request.param
    place.mkdir()
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", *LAUNCHES[request.param]]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(Path(__file__).parent / "distributed_run.py"), str(place)]
    tests = Path(__file__).parent
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
    return folder / ("adapter-of-one" if two.name == "ddp" else "adapter-by-difference")


def test_two_processes_do_what_one_does(folder, two):
    """Accumulation, checkpointing, the structural term and KL to the base included, with weights on one of them."""
    place = of_one(folder, two)
    one = load_file(place / "adapter_model.safetensors")
    # under FSDP2 the structural term is a central difference, which magnifies rounding
    assert_close(load_file(two / "trajectory" / "adapter_model.safetensors"), one, tolerance=1e-4)
    before = torch.load(folder / "before.pt")
    for part in (".alter_A.", ".forget_0", ".forget_1", ".retain"):
        moved = [(one[n] - before[_with_name(n)]).abs().max().item() for n in one if part in f"{n}."]
        assert max(moved) > 1e-2, part
    places = two / "trajectory", place
    logs = [TrainerState.load_from_json(place / "state.json").log_history for place in places]
    same = ("loss", "loss/forget", "loss/retain", "loss/structural", "grad_norm/shared", "grad_norm/experts")
    assert len(logs[1]) > 4
    for found, expected in zip(*(log[:-1] for log in logs), strict=True):
        expected.setdefault("grad_norm/shared", 0.0)  # one process gives A no gradient in steps without the term
        assert [found[name] for name in same] == pytest.approx([expected[name] for name in same], rel=1e-2)


def _with_name(key: str) -> str:
    """The key in a model's own state dict, where adapters have names."""
    stem, last = key.rsplit(".", 1)
    return f"{stem}.default.{last}"


def test_an_adapter_of_two_processes_loads_in_one(folder, two, tokenizer):
    ids = torch.tensor([tokenizer("Where does Alice live? Alice lives in")["input_ids"]])
    logits = [
        PeftModel.from_pretrained(make_llama(len(tokenizer)), place).eval()(ids).logits
        for place in (two / "trajectory", of_one(folder, two))
    ]
    # weights agree to 1e-4 of their size (above), so logits to about that of theirs, and no better
    scale = logits[1].abs().max().item()
    torch.testing.assert_close(*logits, atol=1e-3 * scale, rtol=0.0)
    base = make_llama(len(tokenizer))(ids).logits
    assert (logits[0] - base).abs().max() > 0.1 * scale


def test_two_processes_resume_within_an_epoch(folder, two):
    """With AdamW, whose state is resumed too, on an adapter that one process wrote."""
    states = [TrainerState.load_from_json(two / f"{name}-adapter" / "state.json") for name in ("whole", "rest")]
    assert states[0].global_step == states[1].global_step == 8
    whole, rest = (load_file(two / f"{name}-adapter" / "adapter_model.safetensors") for name in ("whole", "rest"))
    assert_close(rest, whole, tolerance=1e-7)
    one = load_file(folder / "adapter-of-one" / "adapter_model.safetensors")
    moved = {name: (whole[name] - one[name]).abs().max().item() for name in one if ".alter_B." in name}
    assert 1e-2 < max(moved.values()) < 0.2  # from where that adapter was


def test_phase_one_is_the_main_process_own(folder, two):
    """Its cluster start and its calibrated targets too: the other process had no weights to find them with."""
    one, main, other = (torch.load(f) for f in (folder / "clusters.pt", two / "clusters-0.pt", two / "clusters-1.pt"))
    assert any(value.any() for name, value in one.items() if ".forget_0" in name)
    assert_close(other, main, tolerance=0.0)
    fitted = [name for name in one if ".alter_router." in name]  # a regression, whose solver magnifies rounding
    assert len(fitted) == 4 and all(main.pop(name).any() and one.pop(name).any() for name in fitted)
    assert_close(main, one, tolerance=1e-6)


@pytest.mark.parametrize(("name", "is_known"), [("unknown", False), ("known", True), ("by general text", False)])
def test_the_main_process_says_for_all_whether_there_is_anything_to_forget(two, name, is_known):
    """Of plain LoRA; the other process had no weights, and would have trained alone what the main one leaves."""
    main, other = (torch.load(two / f"{name}-{process}.pt", weights_only=False) for process in (0, 1))
    assert (
        main["before"].level == other["before"].level
        and main["before"].is_known == is_known
        and main["status"] == other["status"] == 3
    )
    assert torch.equal(main["before"].forget, other["before"].forget)
    assert torch.equal(main["before"].retain, other["before"].retain)
    assert torch.equal(main["targets"], other["targets"]) and len(main["targets"]) == 8
    assert torch.equal(main["after"], other["after"]) and len(main["after"]) == (8 if is_known else 0)
    assert (two / name / "adapter_model.safetensors").exists() == is_known


# ---- what cannot work ----------------------------------------------------------------------------------------------


def under_fsdp(model: nn.Module, **options: Any) -> Any:
    """Arguments of `set_up_distributed`: as much of an accelerator as is checked, the model, the norm."""
    usual = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": OffloadPolicy()}
    plugin = SimpleNamespace(**{**usual, "state_dict_type": StateDictType.FULL_STATE_DICT, **options})
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    return accelerator, model, None


def test_fsdp_options_that_alter_cannot_honour(llama):
    model = get_peft_model(llama, AlterConfig(num_forget_experts=2, r=4))
    set_up_distributed(*under_fsdp(model))
    with pytest.raises(ValueError, match="`fsdp_version` is 1, but must be 2"):
        set_up_distributed(*under_fsdp(model, fsdp_version=1))
    with pytest.raises(ValueError, match=r"`fsdp_activation_checkpointing` is True.*`gradient_checkpointing=True`"):
        set_up_distributed(*under_fsdp(model, activation_checkpointing=True))
    with pytest.raises(ValueError, match="`fsdp_offload_params` is True"):
        set_up_distributed(*under_fsdp(model, cpu_offload=CPUOffloadPolicy()))
    with pytest.raises(ValueError, match=r"`fsdp_state_dict_type` is SHARDED_STATE_DICT, .*Set FULL_STATE_DICT"):
        set_up_distributed(*under_fsdp(model, state_dict_type=StateDictType.SHARDED_STATE_DICT))


def under_deepspeed(stage: int = 2, max_grad_norm: float = 0.0, model: Any = None, **config: Any) -> Any:
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), model, max_grad_norm


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_a_head_that_learns_is_refused_where_weights_are_in_parts(llama, options):
    model = get_peft_model(llama, AlterConfig(num_forget_experts=2, r=4, router="static", **options))
    set_up_distributed(*under_deepspeed(model=model))
    for parts in (under_fsdp(model), under_deepspeed(stage=3, model=model)):
        with pytest.raises(ValueError, match=r"LM head.*`modules_to_save`"):
            set_up_distributed(*parts)


@pytest.mark.parametrize(("is_main", "is_split"), [(True, False), (False, False), (False, True)])
def test_what_the_main_process_finds_every_process_has(is_main, is_split, monkeypatch):
    monkeypatch.setattr(distributed, "is_zero3_split", lambda model: is_split)
    monkeypatch.setattr(distributed, "from_main_process", lambda value: ("sent", value))
    looked: list[str] = []
    accelerator: Any = SimpleNamespace(is_main_process=is_main, num_processes=2)
    found: Any = by_main_process(accelerator, nn.Linear(1, 1), lambda: looked.append("here") or "found")
    assert looked == ["here"] * (is_main or is_split)
    assert found == ("sent", "found" if looked else None)
    if is_main:
        accelerator.num_processes = 1
        assert by_main_process(accelerator, nn.Linear(1, 1), lambda: "found") == "found"


def test_deepspeed_options_that_alter_cannot_honour():
    accelerator, *others = under_deepspeed()
    set_up_distributed(accelerator, *others)  # without it, DeepSpeed clips at 1
    assert accelerator.state.deepspeed_plugin.deepspeed_config == {"gradient_clipping": 0.0}
    with pytest.raises(ValueError, match="`deepspeed_config` has an `optimizer`"):
        set_up_distributed(*under_deepspeed(optimizer={"type": "AdamW"}))
    with pytest.raises(ValueError, match=r"`max_grad_norm` is 1.0, but must be 0"):
        set_up_distributed(*under_deepspeed(max_grad_norm=1.0))
    with pytest.raises(ValueError, match=r"`gradient_clipping` is 0.5, but must be 0"):
        set_up_distributed(*under_deepspeed(gradient_clipping=0.5))


def test_a_resting_group_keeps_its_weights_under_adam(llama):
    """DeepSpeed's optimiser steps on every group, also on gradients of zero, with momentum and weight decay."""
    model = get_peft_model(llama, AlterConfig(num_forget_experts=2, r=4, router="static", init_weights=False))
    groups = parameter_groups(model, each_expert=True)
    assert {name for name, parameters in groups.items() if parameters} == {"shared", "retain", "forget_0", "forget_1"}
    optimizer = torch.optim.AdamW(
        [{"name": name, "params": parameters, "lr": 0.1} for name, parameters in groups.items() if parameters],
        weight_decay=0.1,
    )
    resting: set[str] = set()
    skip_groups(optimizer, lambda: resting)
    for resting in (set(), {"forget_0", "shared"}):
        before = {name: [weight.detach().clone() for weight in group] for name, group in groups.items()}
        for parameters in groups.values():
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if resting else torch.ones_like(parameter)
        optimizer.step()
        for name, group in groups.items():
            for weight, old in zip(group, before[name], strict=True):
                assert torch.equal(weight, old) == (name in resting), name
    steps = {name: optimizer.state[group[0]]["step"].item() for name, group in groups.items() if group}
    assert steps == {"shared": 1, "retain": 2, "forget_0": 1, "forget_1": 2}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two processes, of which the other one is only pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_tensor_parallel_weights_are_refused(llama, mesh):
    layer = llama.model.layers[3].mlp.up_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(ValueError, match=r"split over processes \(the first is 'model.layers.3.mlp.up_proj.weight'\)"):
        get_peft_model(llama, AlterConfig(num_forget_experts=2, r=4))


@pytest.mark.parametrize("size", [4, 5])
def test_parts_of_a_tensor(mesh, size):
    """What a process holds of A, also where its rows cannot be shared out evenly."""
    tensor = torch.arange(size * 3.0).view(size, 3)
    like = nn.Parameter(distribute_tensor(torch.zeros(size, 3), mesh, [Shard(0)], src_data_rank=None))
    assert is_sharded(like) and not is_sharded(tensor)
    assert torch.equal(shard_like(tensor, like), tensor[: (size + 1) // 2])
    assert torch.equal(shard_like(tensor, tensor), tensor)
    (local_shard(like) * shard_like(tensor, like)).sum().backward()
    assert torch.equal(local_shard(like.grad), shard_like(tensor, like))


# ---- launch configurations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_accelerates_own(path):
    """Every key is known to `accelerate launch`, and each file is what its name says."""
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and config.num_processes == 8
    flags = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= flags
    assert set(config.deepspeed_config) <= flags
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
