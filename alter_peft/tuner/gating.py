# SPDX-License-Identifier: Apache-2.0
"""How the gates reach the layers: the one state that an adapted model carries through a forward pass.

Each thread has a state of its own, so that threads may share a model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import AlterConfig
from .decoder_call import Tokens
from .expert_bank import check_rows, scale_gates
from .mixed_batch import RowAdapters
from .moving_average import Context
from .shares import Shares, look, shares_of
from .token_router import AlterRouter


class Found(NamedTuple):
    """
    What is found of an adapter's weights before a pass, as far as this process has them whole.

    retain_is_zero: whether B_r is zero in every layer.
    is_frozen: whether no expert learns, and no A.
    """

    retain_is_zero: bool = False
    is_frozen: bool = False


class GateState(NamedTuple):
    """
    What the layers read in one forward pass, and again when checkpointing recomputes it.

    gates: adapter name -> g, (B, T, 1+N).
    shares: adapter name -> what its experts do, as far as that was looked up; in a mixed batch, of its rows alone.
    idle: adapters that do nothing in this pass.
    learner: the adapter that the rest is about; `None` if it is about all of them.
    owner: (B, 1+N), 1 where an expert learns from a row; `None` if all learn from all rows.
    learns_experts, learns_shared: whether gradients reach the experts and A.
    """

    gates: dict[str, Tensor]
    shares: dict[str, Shares]
    idle: set[str]
    learner: str | None = None
    owner: Tensor | None = None
    learns_experts: bool = True
    learns_shared: bool = True

    def concerns(self, name: str) -> bool:
        """Whether this adapter is what learns, or what is measured: others that are active act as they always do."""
        return self.learner is None or self.learner == name


def _no_pass() -> GateState:
    return GateState(gates={}, shares={}, idle=set())


class GatingContext:
    """The state of one base model in one thread, shared by its hooks and by all of its ALTER layers."""

    def __init__(self, routers: list[AlterRouter]) -> None:
        self.routers = routers
        self.num_layers = 0  # of the decoder, in this pass
        self.state = _no_pass()
        self.base_pass = False
        self.mixed: RowAdapters | None = None  # set when each row has an adapter of its own
        # adapter -> temporary scales of its experts, (1+N,) or (B, 1+N): see `ExpertControl.experts`
        self.expert_scales: dict[str, Tensor] = {}
        self.decoder: Any = None  # the one that runs
        self.tokens = Tokens()
        self.entropy: Tensor | None = None
        self.observer: Callable[[str, Context], None] | None = None
        self._supplied = _no_pass()
        self._supplied_entropy: Tensor | None = None

    @contextmanager
    def supply(
        self,
        learner: str | None = None,
        entropy: Tensor | None = None,
        owner: Tensor | None = None,
        learns_experts: bool = True,
        learns_shared: bool = True,
    ) -> Iterator[None]:
        """For the forward passes inside: S_q (B, T) of the base model, and who learns (see `GateState`)."""
        before = self._supplied, self._supplied_entropy
        self._supplied = GateState({}, {}, set(), learner, owner, learns_experts, learns_shared)
        self._supplied_entropy = entropy
        self.begin(Tokens())  # a static router has no hook that would
        try:
            yield
        finally:
            self._supplied, self._supplied_entropy = before

    @contextmanager
    def replaying(self, state: GateState) -> Iterator[None]:
        """The layers inside see the gates of an earlier forward pass."""
        current, self.state = self.state, state
        try:
            yield
        finally:
            self.state = current

    @contextmanager
    def mixing(self, mixed: RowAdapters) -> Iterator[None]:
        """In the forward passes inside, each row has an adapter of its own."""
        self.mixed = mixed
        try:
            yield
        finally:
            self.mixed = None

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The forward passes inside are the base model's own; gradients are left as they are."""
        before, self.base_pass = self.base_pass, True
        try:
            yield
        finally:
            self.base_pass = before

    def begin(self, tokens: Tokens) -> None:
        """Start a forward pass with what was supplied for it."""
        self.entropy, self.tokens = self._supplied_entropy, tokens
        self.state = self._supplied._replace(gates={}, shares={}, idle=set())

    def active(self) -> list[tuple[AlterRouter, str]]:
        """The enabled routers and their active adapters; in a mixed batch, the adapters of its rows."""
        return [
            (router, name)
            for router in self.routers
            if not router.disable_adapters
            for name in (router.active_adapters if self.mixed is None else self.mixed.adapters)
            if name in router.alter_router
        ]

    def flattened_batch(self, x: Tensor) -> int | None:
        """B, if `x` is the (B T, k) that a decoder may have made of its tokens in this pass; `None` if it is not."""
        if x.dim() != 2:
            return None
        gates = [self.state.gates[name] for _, name in self.active() if name in self.state.gates]
        if not gates:
            return None if self.state.owner is None else self.state.owner.shape[0]
        return gates[0].shape[0] if gates[0].shape[:-1].numel() == x.shape[0] else None

    def share_out(self, configs: Mapping[str, AlterConfig], found: Mapping[str, Found]) -> None:
        """
        Look up which experts of these adapters take part in the pass, once their gates are known.

        Args:
            configs: of the adapters.
            found: what was found of their weights.
        """
        gates = {name: self.state.gates[name] for name in configs if self._may_look_up(name, found[name])}
        batch = next((len(own) for own in gates.values()), 0)
        rows: dict[str, list[int]] = {}
        if self.mixed is not None and gates:
            rows = self.mixed.groups(batch)
            gates = {name: own[rows[name]] for name, own in gates.items()}
        for name, (used, whole) in look(gates).items():
            if self._retain_rests(name, found[name]) and (len(used) > 1 or self._may_be_idle(found[name])):
                used = tuple(e for e in used if e > 0)
            if not used:
                self.state.idle.add(name)
                continue
            scaled = self.scaled(name, gates[name], configs[name].scales, rows.get(name), batch)
            self.state.shares[name] = shares_of(gates[name], scaled, used, whole, self._owner(name))

    def _owner(self, name: str) -> Tensor | None:
        return self.state.owner if self.state.concerns(name) else None

    def _may_look_up(self, name: str, found: Found) -> bool:
        """Whether nothing is lost by what takes no part: in a training it would have a gradient, of zeros."""
        if not torch.is_grad_enabled() or found.is_frozen:
            return True
        isolated = self._owner(name) is not None or not self.state.learns_experts
        return isolated and self.state.concerns(name) and not _is_distributed()

    def _may_be_idle(self, found: Found) -> bool:
        return not torch.is_grad_enabled() or found.is_frozen

    def _retain_rests(self, name: str, found: Found) -> bool:
        """Whether the retain expert is zero, and not to learn in this pass."""
        if not found.retain_is_zero or self._may_be_idle(found) or not self.state.learns_experts:
            return found.retain_is_zero
        owner = self._owner(name)
        return owner is not None and not bool(owner[:, 0].any())

    def scaled(
        self, name: str, gates: Tensor, saved: tuple[float, ...], rows: list[int] | None = None, batch: int = 0
    ) -> Tensor:
        """
        Gates times the scales of the experts, those of `ExpertControl.experts` before the saved ones.

        Args:
            gates: (B, T, 1+N), or of these rows alone of a mixed batch of this size.
        """
        temporary = self.expert_scales.get(name)
        if temporary is not None and temporary.dim() == 2 and rows is not None:
            check_rows(temporary, batch)
            temporary = temporary[rows]
        return scale_gates(gates, saved, temporary)

    def competing(self, name: str) -> Tensor:
        """Of the pass just made: gates (B, T, 1+N) whose greatest is the expert that a token was sent to."""
        router = next(router for router in self.routers if name in router.alter_router)
        return router.config[name].routing.competing(self.state.gates[name])

    def entropy_for(self, name: str, config: AlterConfig) -> Tensor | None:
        """S_q (B, T) as this adapter takes it: what was supplied, or the base pass if it asks for one."""
        supplied = self._supplied_entropy is not None and self._supplied.concerns(name)
        return self.entropy if supplied or config.inference_entropy == "base" else None

    def gates_for(self, name: str, h: Tensor) -> Tensor:
        """The gates of an adapter, (B, T, 1+N), for a layer whose A x is `h`; a shape that doesn't fit raises."""
        gates = self.state.gates.get(name)
        if gates is None:
            raise ValueError(
                f"The layers of adapter {name!r} were run without the decoder layer that gates them. Call the whole "
                "model, or use `AlterConfig(router='static')`."
            )
        if gates.shape[:-1] != h.shape[:-1]:
            raise ValueError(
                f"A layer of adapter {name!r} was given an input of shape {tuple(h.shape[:-1])} before its last "
                f"dimension, but its tokens were gated as (batch, length) = {tuple(gates.shape[:-1])}. Exclude this "
                "layer by `exclude_modules`, or use `AlterConfig(router='static')`."
            )
        return gates


def _is_distributed() -> bool:
    """Whether other processes may wait for gradients of this one, of all experts."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Threads(threading.local):
    """`context`: the state of the thread that asks, made when it first does."""

    def __init__(self, contexts: GatingContexts) -> None:
        self.context = GatingContext(contexts.routers)


class GatingContexts:
    """
    The states of one base model, one for each thread.

    routers: of all decoder layers that have one.
    """

    def __init__(self) -> None:
        self.routers: list[AlterRouter] = []
        self._threads = _Threads(self)

    @property
    def here(self) -> GatingContext:
        """The state of this thread."""
        return self._threads.context

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles: no pass is under way in them
        return {"routers": self.routers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.routers = state["routers"]
        self._threads = _Threads(self)
