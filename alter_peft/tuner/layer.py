# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import AlterConfig
from .expert_bank import ExpertBank, SharedProjection
from .gating import Found, GatingContext, GatingContexts
from .mixed_batch import RowAdapters
from .shares import Shares
from .token_router import AlterTunerLayer


# Why a gated adapter isn't merged, and the ways out
NO_FIXED_WEIGHT = (
    "no merged weight equals it. Keep it as an adapter, train with `AlterConfig(router='static')`, or fold it at "
    "fixed `expert_weights` with `alter_peft.tuner.export.export_to_lora`, which changes what it does."
)


def _refuse_packed(layer: Any) -> None:
    """Raise a `ValueError` if bitsandbytes has packed a 4-bit weight in a way that it does not dequantise."""
    weight = getattr(layer, "weight", None)  # some quantised layers have none
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "A 4-bit base layer has been packed for this CPU by its first forward pass, after which bitsandbytes does "
            "not give its weights back. Merge before any forward pass, or on a GPU, or load the base in other bits."
        )


class AlterLayer(AlterTunerLayer):
    """Holds A and the experts of every adapter on one layer."""

    adapter_layer_names: tuple[str, ...] = ("alter_A", "alter_B")
    other_param_names = ("r", "lora_alpha", "scaling", "alter_dropout", "expert_weights", "expert_scales")

    def __init__(self, base_layer: nn.Module, contexts: GatingContexts, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.contexts = contexts
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        # omega of the static router, 1 for the retain expert first; None for gated routers
        self.expert_weights: dict[str, tuple[float, ...] | None] = {}
        # what each expert is multiplied by after the gates (`AlterConfig.scales`)
        self.expert_scales: dict[str, tuple[float, ...]] = {}
        self.alter_dropout = nn.ModuleDict({})
        self.alter_A: Any = nn.ModuleDict({})  # of SharedProjection
        self.alter_B: Any = nn.ModuleDict({})  # of ExpertBank
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs
        self.flattens = False  # whether the decoder gives it all tokens as (B T, k), as OPT and shared experts do

        layer = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(layer, **kwargs)
        if isinstance(layer, nn.Linear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
        elif self.quantization_backend is not None:
            in_features, out_features = _get_in_out_features(layer)
            assert in_features is not None and out_features is not None
            self.in_features, self.out_features = in_features, out_features
        elif isinstance(layer, Conv1D):
            shape = layer.weight.ds_shape if hasattr(layer.weight, "ds_shape") else layer.weight.shape
            self.in_features, self.out_features = shape
        else:
            raise TypeError(f"AlterLayer cannot adapt a {type(layer).__name__}; supported are Linear and Conv1D.")

    @property
    def context(self) -> GatingContext:
        """The gating state of this thread."""
        return self.contexts.here

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: AlterConfig) -> None:
        """Create A and the experts of an adapter on this layer."""
        num_forget_experts = config.num_forget_experts or 1
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        weights = config.expert_weights or [1.0] * num_forget_experts
        self.expert_weights[adapter_name] = None if config.is_gated else (1.0, *weights)
        self.expert_scales[adapter_name] = config.scales
        self.alter_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.alter_A[adapter_name] = SharedProjection(self.in_features, r)
        self.alter_B[adapter_name] = ExpertBank(self.out_features, r, num_forget_experts)
        self.reset_alter_parameters(adapter_name, random=config.init_weights is False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_alter_parameters(self, adapter_name: str, random: bool) -> None:
        """Kaiming-uniform A; B at zero, so that the fresh adapter is the base model, or random for tests."""
        nn.init.kaiming_uniform_(self.alter_A[adapter_name].weight, a=math.sqrt(5))
        for expert in self.alter_B[adapter_name].experts():
            if random:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
            else:
                nn.init.zeros_(expert)

    def fixed_weights(self, adapter: str, expert_weights: Sequence[float] | None = None) -> tuple[float, ...]:
        """
        What each expert is multiplied by where no token is gated, the retain expert first: omega times its scale.

        Args:
            expert_weights: omega_1..omega_N; those of the config by default, which the static router alone has.
        """
        omega = self.expert_weights[adapter] if expert_weights is None else (1.0, *expert_weights)
        if omega is None:
            raise ValueError(f"Adapter {adapter!r} gates every token by itself, so {NO_FIXED_WEIGHT}")
        return tuple(w * scale for w, scale in zip(omega, self.expert_scales[adapter], strict=True))

    def combined_expert(self, adapter: str, expert_weights: Sequence[float] | None = None) -> Tensor:
        """B_r + sum_d omega_d B_f^d of Eq. 6, (d, r); `expert_weights` as for `fixed_weights`."""
        weights = self.fixed_weights(adapter, expert_weights)
        experts = self.alter_B[adapter].experts()
        return torch.stack([w * B for w, B in zip(weights, experts, strict=True)]).sum(dim=0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s (B_r + sum_d omega_d B_f^d) A in the shape of the base weight (Eq. 6); the static router alone has one."""
        delta = self.combined_expert(adapter) @ self.alter_A[adapter].weight * self.scaling[adapter]
        oriented: Tensor = transpose(delta, isinstance(self.get_base_layer(), Conv1D))
        return oriented

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether one weight delta equals the adapter, as `peft.convert_to_lora` asks: with the static router."""
        return self.expert_weights.get(adapter_name) is not None


class AlterLinear(nn.Module, AlterLayer):
    """ALTER on a linear layer (`nn.Linear`, quantised or not, or transformers' `Conv1D`)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        contexts: GatingContexts,
        config: AlterConfig,
        r: int,
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        AlterLayer.__init__(self, base_layer, contexts, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """
        y = W0 x + s sum_e g_e B_e A x (Eqs. 2, 6, 9).

        Args:
            x: (B, T, k), or (B T, k) where it `flattens`, under a gated router, (..., k) under the static one.

        Returns:
            y: (..., d), in the dtype of the base layer's output.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged or self.context.base_pass:
            return result
        batch = self.context.flattened_batch(x) if self.flattens else None
        if batch is None:
            return self._updated(x, result)
        return self._updated(x.unflatten(0, (batch, -1)), result.unflatten(0, (batch, -1))).flatten(0, 1)

    def _updated(self, x: Tensor, result: Tensor) -> Tensor:
        context = self.context
        if context.mixed is not None:
            return self._add_by_row(context.mixed, x, result)
        dtype, backend = result.dtype, self.quantization_backend
        idle, adapters = context.state.idle, self.alter_A
        for name in self.active_adapters:
            if name not in idle and name in adapters:
                if backend is not None:  # once
                    result, backend = backend.maybe_clone_base_result(result), None
                delta = self._delta(name, x).to(dtype)
                # s is applied on the way, in one pass over the update
                result = torch.add(result, delta, alpha=self.scaling[name])
        return result

    def _add_by_row(self, mixed: RowAdapters, x: Tensor, result: Tensor) -> Tensor:
        """Add to each row the update of its own adapter."""
        idle = self.context.state.idle
        for name, rows in mixed.groups(x.shape[0]).items():
            if name in self.alter_A and name not in idle:
                delta = self._delta(name, x, rows).to(result.dtype)
                result[rows] += self.scaling[name] * delta
        return result

    def _delta(self, name: str, x: Tensor, rows: list[int] | None = None) -> Tensor:
        """The update of one adapter before its scale s; of these rows alone, in a mixed batch."""
        context, A = self.context, self.alter_A[name]
        state = context.state
        if context.expert_scales and self.training and torch.is_grad_enabled() and name in context.expert_scales:
            # checkpoints would be recomputed after the context has been left
            raise ValueError(
                "The temporary scales of `experts` are for inference, but the model is in training mode. Call "
                "`model.eval()`, or scale the expert by `set_expert_scale`."
            )
        gates = None if self.expert_weights[name] is not None else context.gates_for(name, x)
        batch = x.shape[0]
        x = self._cast_input_dtype(x if rows is None else x[rows], A.weight.dtype)
        concerned = state.concerns(name)
        if concerned and self.training:
            x = self.alter_dropout[name](x)
        h = A(x, learn=state.learns_shared or not concerned)  # (..., r)
        shares = state.shares.get(name)
        if shares is None:  # one was not looked up
            shares = self._shares(name, h, gates, rows, batch, state.owner if concerned else None)
        delta: Tensor = self.alter_B[name](h, shares, learn=state.learns_experts or not concerned)
        return delta

    def _shares(
        self, name: str, h: Tensor, gates: Tensor | None, rows: list[int] | None, batch: int, owner: Tensor | None
    ) -> Shares:
        """All experts, whoever has a token."""
        if gates is None:
            weights = self.expert_weights[name]
            assert weights is not None
            own = h.new_tensor(weights).expand(*h.shape[:-1], len(weights))
        else:  # the layer may be on another device than the router
            own = (gates if rows is None else gates[rows]).to(h)
        return Shares(self.context.scaled(name, own, self.expert_scales[name], rows, batch), owner=owner)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the update of the active adapters to the base weight (static router alone, Eq. 6 with fixed omega).

        Args:
            safe_merge: check for NaNs in a copy first.
            adapter_names: the adapters to merge; all active ones by default.

        Raises:
            ValueError: NaNs with `safe_merge`, an adapter that gates its tokens, or 4 bits that a CPU has packed.
            TypeError: a quantised base whose weights cannot be written back (GPTQ, AWQ and others), by PEFT.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.alter_A:
                continue
            _refuse_packed(self.get_base_layer())
            weight = self.get_base_weight()  # dequantised
            merged = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            _refuse_packed(self.get_base_layer())
            name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            self.set_base_weight(weight - self.get_delta_weight(name).to(weight.dtype))

    def __repr__(self) -> str:
        return "alter." + super().__repr__()


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, AlterLayer]:
    """The layers that an adapter adapts, by their names in the model."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, AlterLayer) and adapter_name in m.alter_A}


def contexts_of(model: nn.Module) -> GatingContexts | None:
    """The gating states that a model's ALTER layers share; `None` without such layers."""
    return next((module.contexts for module in model.modules() if isinstance(module, AlterLayer)), None)


def found_of(decoder: nn.Module, names: Iterable[str]) -> dict[str, Found]:
    """What is found of the weights of adapters on this decoder."""
    layers = [module for module in decoder.modules() if isinstance(module, AlterLayer)]
    found = {}
    for name in names:
        own = [layer for layer in layers if name in layer.alter_A]
        parts = [part for layer in own for part in (layer.alter_A[name], layer.alter_B[name])]
        is_frozen = not any(weight.requires_grad for part in parts for weight in part.parameters())
        found[name] = Found(_retain_is_zero(own, name), is_frozen)
    return found


def _retain_is_zero(layers: Sequence[AlterLayer], name: str) -> bool:
    """Whether B_r is zero in all of these layers; not so if this process doesn't hold all of it."""
    trained = []
    for layer in layers:
        retain: Any = layer.alter_B[name].retain
        if type(retain) is not nn.Parameter or retain.shape != (layer.out_features, layer.r[name]) or retain.is_meta:
            return False  # sharded or offloaded
        trained.append(retain.any())
        if len(trained) == 1 and trained[0]:
            return False
    # one look at all of them, each of which an accelerator would have to be waited for
    return not bool(torch.stack([one.to(trained[0].device) for one in trained]).any()) if trained else True
