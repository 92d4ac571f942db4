# SPDX-License-Identifier: Apache-2.0
"""Control of single forget experts: list, switch off and on, scale, delete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import AlterConfig
from .gating import GatingContext, GatingContexts
from .layer import AlterLayer, layers_of
from .token_router import AlterRouter, RouterMap
from .values import is_finite_number


Scale = float | Sequence[float] | Tensor


class Expert(NamedTuple):
    """
    A forget expert as `list_experts` shows it.

    scale: what its share of every token is multiplied by; the saved value, without those of `experts`.
    norm: Frobenius norm over all layers of its weight update s B_f^d A, at scale 1; 0 if it was never trained.
    active: whether it can change an answer: it isn't scaled to 0, and its adapter is active and enabled.
    """

    scale: float
    norm: float
    active: bool


class ExpertControl:
    """What [`AlterModel`] can do with single experts; [`~peft.PeftModel`] forwards these methods to it.

    Experts are named by `AlterConfig.domains`, or `forget_0`, `forget_1`, ... without them. `adapter_name` may be left
    out where one adapter is active.
    """

    peft_config: Any
    contexts: GatingContexts

    @property
    def context(self) -> GatingContext:
        """The gating state of this thread."""
        return self.contexts.here

    def list_experts(self, adapter_name: str | None = None) -> dict[str, Expert]:
        """
        The forget experts of an adapter: domain -> scale, norm, and whether it is active.

        Raises:
            ValueError: no such adapter.
        """
        name, config, layers = self._adapter(adapter_name)
        squares = torch.stack([_squared_norms(layer, name) for layer in layers]).sum(dim=0)
        on = any(name in layer.active_adapters and not layer.disable_adapters for layer in layers)
        found = zip(config.expert_names, config.scales[1:], squares.sqrt().tolist(), strict=True)
        return {domain: Expert(scale, norm, on and scale != 0) for domain, scale, norm in found}

    def set_expert_scale(self, domain: str, scale: float, adapter_name: str | None = None) -> None:
        """
        Scale a forget expert from now on: 1 is on, 0 off. Saved with the adapter, and counted by merging and export.

        The router goes on sending text of that domain to its expert, so with scale 0 the base model answers it. A KV
        cache filled before keeps what was computed then: start a new one. Within `experts` it takes effect when the
        context ends.

        Raises:
            ValueError: no such domain or adapter, a scale that is no finite number, or a merged adapter.
        """
        name, config, layers = self._adapter(adapter_name)
        _check_domain(domain, name, config)
        if not is_finite_number(scale):
            raise ValueError(f"`scale` is {scale!r}, but must be a finite number: 1 on, 0 off.")
        self._refuse_merged(name, layers)
        scales = {**(config.expert_scales or {}), domain: float(scale)}
        config.expert_scales = {key: value for key, value in scales.items() if value != 1} or None
        for layer in layers:
            layer.expert_scales[name] = config.scales

    @contextmanager
    def experts(
        self, scales: Mapping[str, Scale] | None = None, /, *, adapter_name: str | None = None, **by_domain: Scale
    ) -> Iterator[None]:
        """
        Other scales for some forget experts inside the context; the rest keep theirs. For inference.

        They hold in the thread that has entered the context, and in no other: a thread that is started inside, to
        stream what is generated, has to enter it itself.

            >>> with model.experts(private_person=0.0):
            ...     model.generate(**inputs)  # as if that request had never been made
            >>> with model.experts({"secret recipe": [0.0, 1.0]}):
            ...     model(**two_rows)  # for the first row alone

        Args:
            scales: domain -> one number, or one for each row of the batch, (B,). Beams and `num_return_sequences` are
                rows of their own: repeat each row's number for them, by `repeat_interleave`.
            adapter_name: the adapter, if several are active.
            by_domain: the same as `scales`, for domains whose names are Python names.

        Raises:
            ValueError: no such domain or adapter, numbers that aren't finite, rows of different counts, or a merged
                adapter; inside, a batch of another size, and a forward pass in training mode.
        """
        name, config, layers = self._adapter(adapter_name)
        self._refuse_merged(name, layers)
        before = self.context.expert_scales.get(name)
        start = torch.tensor(config.scales) if before is None else before
        self.context.expert_scales[name] = _replaced(start, {**(scales or {}), **by_domain}, name, config)
        try:
            yield
        finally:
            if before is None:
                del self.context.expert_scales[name]
            else:
                self.context.expert_scales[name] = before

    def delete_expert(self, domain: str, adapter_name: str | None = None) -> None:
        """
        Remove a forget expert for good: B_f^d of every layer, the router's row, and its place in the config.

        All other weights stay as they are. A token whose gate for that expert was 0 is answered as before, to
        rounding; text of the deleted domain goes to the expert that the router thinks next best, which need not be the
        retain expert. Give an optimiser the parameters anew.

        Raises:
            ValueError: no such domain or adapter, the last forget expert, a merged adapter, or within `experts`.
        """
        name, config, layers = self._adapter(adapter_name)
        _check_domain(domain, name, config)
        names = config.expert_names
        if len(names) == 1:
            raise ValueError(
                f"{domain!r} is the only forget expert of adapter {name!r}. Switch it off by "
                f"`set_expert_scale({domain!r}, 0)`, or remove the adapter by `delete_adapter({name!r})`."
            )
        self._refuse_merged(name, layers)
        if name in self.context.expert_scales:
            raise ValueError(f"An expert of adapter {name!r} cannot be deleted within `experts`. Leave the context.")
        d = names.index(domain)
        config.domains = names[:d] + names[d + 1 :]
        config.num_forget_experts = len(config.domains)
        if config.expert_weights is not None:
            config.expert_weights = config.expert_weights[:d] + config.expert_weights[d + 1 :]
        scales = {key: value for key, value in (config.expert_scales or {}).items() if key != domain}
        config.expert_scales = scales or None
        for layer in layers:
            layer.alter_B[name].delete(d)
            layer.expert_scales[name] = config.scales
            weights = layer.expert_weights[name]
            if weights is not None:
                layer.expert_weights[name] = weights[: d + 1] + weights[d + 2 :]
        for router in self.context.routers:
            if name in router.alter_router:
                _delete_output(router, name, d + int(config.routing.retain_competes))

    def _adapter(self, adapter_name: str | None) -> tuple[str, AlterConfig, list[AlterLayer]]:
        tuner: Any = self
        if adapter_name is None:
            active = list(tuner.active_adapters)
            if len(active) != 1:
                raise ValueError(f"`adapter_name` is None, but {active} are active. Name one of them.")
            adapter_name = active[0]
        if adapter_name not in self.peft_config:
            raise ValueError(f"`adapter_name` is {adapter_name!r}, but must be one of {list(self.peft_config)}.")
        return adapter_name, self.peft_config[adapter_name], list(layers_of(tuner, adapter_name).values())

    def _refuse_merged(self, name: str, layers: list[AlterLayer]) -> None:
        if any(name in layer.merged_adapters for layer in layers):
            raise ValueError(f"Adapter {name!r} is merged, so no expert can change. Call `unmerge_adapter` first.")


def _check_domain(domain: str, name: str, config: AlterConfig) -> None:
    if domain not in config.expert_names:
        raise ValueError(
            f"`domain` is {domain!r}, but must be one of the experts of adapter {name!r}: {config.expert_names}."
        )


def _replaced(start: Tensor, scales: Mapping[str, Scale], name: str, config: AlterConfig) -> Tensor:
    """The scales `start`, (1+N,) or (B, 1+N), with those of some domains replaced."""
    columns = {}
    for domain, scale in scales.items():
        _check_domain(domain, name, config)
        value = torch.as_tensor(scale, dtype=torch.float32)
        if value.dim() > 1 or not value.isfinite().all():
            raise ValueError(
                f"The scale of {domain!r} is {scale!r}, but must be a finite number, or one for each row of the batch."
            )
        columns[1 + config.expert_names.index(domain)] = value
    rows = {len(value) for value in columns.values() if value.dim()} | ({len(start)} if start.dim() == 2 else set())
    if len(rows) > 1:
        raise ValueError(f"The scales are of {sorted(rows)} rows. Give as many for every domain.")
    result = start.expand(*rows, start.shape[-1]).clone()
    for column, value in columns.items():
        result[..., column] = value
    return result


@torch.no_grad()
def _squared_norms(layer: AlterLayer, name: str) -> Tensor:
    """||s B_f^d A||_F^2 of each forget expert of a layer, (N,), from r x r products alone."""
    A = layer.alter_A[name].weight.double()
    inner = A @ A.T
    experts = [B.double() for B in layer.alter_B[name].experts()[1:]]
    norms = torch.stack([((B.T @ B) * inner).sum() for B in experts]).clamp(min=0)
    return (norms * layer.scaling[name] ** 2).cpu()


def _delete_output(router: AlterRouter, name: str, row: int) -> None:
    made: RouterMap = router.alter_router[name]
    for key in ("weight", "bias") if made.bias is not None else ("weight",):
        weight = getattr(made, key)
        kept = torch.cat([weight[:row], weight[row + 1 :]]).detach()
        setattr(made, key, nn.Parameter(kept, requires_grad=weight.requires_grad))
    made.out_features -= 1
