# SPDX-License-Identifier: Apache-2.0
"""What weights in parts (FSDP2, DeepSpeed ZeRO) ask of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from alter_peft.scoring import ScoredModel
from alter_peft.tuner.decoder import LanguageModelHead


T = TypeVar("T")


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether training runs under FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether training runs under DeepSpeed."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def gathers_layers(accelerator: Accelerator) -> bool:
    """Whether layers gather their weights as they run (FSDP2, ZeRO-3): all processes make the same passes then."""
    zero3 = uses_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3
    return uses_fsdp(accelerator) or zero3


@contextmanager
def zero3_gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has split are whole, to be read; all processes call this together."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def is_zero3_split(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the weights already, as while they were loaded, so that no process has them."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathering_layers(model: nn.Module) -> Iterator[None]:
    """Inside, each module has its own weights whole while it runs, before DeepSpeed itself sees to that."""
    running: dict[nn.Module, ExitStack] = {}

    def before(module: nn.Module, args: Any) -> None:
        running[module] = ExitStack()
        running[module].enter_context(zero3_gathered(module.parameters(recurse=False)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running.pop(module).close()

    with ExitStack() as stack:
        for module in model.modules() if is_zero3_split(model) else ():
            if any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
                stack.enter_context(module.register_forward_pre_hook(before))
                stack.enter_context(module.register_forward_hook(after))
        yield


def reshard(model: nn.Module) -> None:
    """After a pass without a backward, after which FSDP2 leaves its root whole: each process has its part again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone (FSDP2)."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, differentiably; the tensor itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of `tensor`, which all have, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


class WholeHead(LanguageModelHead):
    """
    The LM head of a sharded model, held whole by every process: V x k numbers.

    The losses call the head on chunks of rows, in forward and again in backward, outside of the model's forward. How
    many chunks there are is each process's own affair, while gathering weights is one of all processes together; so
    they are gathered once. The head is frozen: the copy stays true.

    Args:
        model: the base model, sharded; all processes call this together.
        device: where the hidden states are.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(model)
        sharded: Any = model.get_output_embeddings()
        sizes = sharded.in_features, sharded.out_features
        self._whole = nn.Linear(*sizes, bias=sharded.bias is not None, device="meta").requires_grad_(False)
        for name, parameter in sharded.named_parameters(recurse=False):
            with zero3_gathered([parameter]):
                copy = full_tensor(parameter.detach()).to(device, copy=True)
            setattr(self._whole, name, nn.Parameter(copy, requires_grad=False))

    @property
    def module(self) -> nn.Module:
        return self._whole

    def __call__(self, hidden: Tensor) -> Tensor:
        return super().__call__(hidden.to(self._whole.weight.dtype))


class HeadGathering(TrainerCallback):
    """Gives a model's scoring the whole head as training begins, where layers gather their weights as they run."""

    def __init__(self, scored: ScoredModel, accelerator: Accelerator) -> None:
        self.scored, self.accelerator = scored, accelerator

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if gathers_layers(self.accelerator):
            self.scored.head = WholeHead(self.scored.base, self.accelerator.device)


def set_up_distributed(accelerator: Accelerator, model: Any, max_grad_norm: float | None) -> None:
    """
    Set what training on forget and retain rows needs.

    Raises:
        ValueError: a set-up under which it cannot work, before any compute.
    """
    if uses_deepspeed(accelerator):
        _set_up_deepspeed(accelerator.state.deepspeed_plugin, max_grad_norm)
    if uses_fsdp(accelerator):
        _check_fsdp(accelerator.state.fsdp_plugin)
    if gathers_layers(accelerator):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        _check_head(base.get_output_embeddings())


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}, but must be 2: FSDP 1 flattens A and the experts into one "
            "parameter, so that none has an optimiser step of its own."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` is True, but must be False: it knows no gates when it recomputes a "
            "layer. Set `gradient_checkpointing=True` in AlterUnlearnConfig instead."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "`fsdp_offload_params` is True, but must be False: the structural term has no A on a CPU. Use more "
            "processes, or `gradient_checkpointing=True`."
        )
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type.name}, with which transformers saves no adapter. Set "
            "FULL_STATE_DICT."
        )


def _check_head(head: nn.Module) -> None:
    if not isinstance(head, nn.Linear) or any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            f"The LM head is a {type(head).__name__} and no frozen `torch.nn.Linear`, as training under FSDP and "
            "ZeRO-3 needs. Remove it from `modules_to_save` and `target_modules`, or train with DDP or ZeRO-2."
        )


def _set_up_deepspeed(plugin: Any, max_grad_norm: float | None) -> None:
    if "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            "`deepspeed_config` has an `optimizer`, which knows no experts. Remove it; `optim` and the rates of "
            "AlterUnlearnConfig are used."
        )
    clipping = plugin.deepspeed_config.get("gradient_clipping", "auto")
    for name, value in (("max_grad_norm", max_grad_norm), ("gradient_clipping", clipping)):
        if value not in ("auto", 0, None):
            raise ValueError(
                f"`{name}` is {value}, but must be 0 under DeepSpeed, which clips all gradients by one norm: an "
                "expert would learn less because another's gradient is large."
            )
    # accelerate leaves a 0 out of the config, and DeepSpeed then clips at its default of 1
    plugin.deepspeed_config["gradient_clipping"] = 0.0


def from_main_process(value: Any) -> Any:
    """What the main process passes, on every process."""
    return broadcast_object_list([value], from_process=0)[0]


def looks(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether this process looks at the data before the training; see `by_main_process`."""
    return accelerator.is_main_process or is_zero3_split(model)


def by_main_process(accelerator: Accelerator, model: nn.Module, find: Callable[[], T]) -> T:
    """
    What the main process finds, on every process. The others wait: they may have no weights yet.

    Where ZeRO-3 has split the weights, so that no process has them, all look together.
    """
    found: Any = find() if looks(accelerator, model) else None
    together: T = from_main_process(found) if accelerator.num_processes > 1 else found
    return together


def copy_from_main_process(weights: Mapping[str, Tensor]) -> None:
    """Gives these weights of every process the values that they have on the main one."""
    held = {name: weight.detach().cpu() for name, weight in weights.items()}
    for name, value in from_main_process(held).items():
        weights[name].data.copy_(value)
