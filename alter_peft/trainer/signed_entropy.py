# SPDX-License-Identifier: Apache-2.0
"""What the structural term differentiates, once or twice: one row's signed sum of entropies as a function of A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alter_peft.entropy import chunked_tsallis_entropy
from alter_peft.losses import exact_structural_invariance
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.base_pass import evaluating


class SignedEntropy:
    """
    f(A) = sum_t eps_t S_q(x_t) over some tokens of one row, at A + offset.

    The layers below the first A are run without a graph: nothing there depends on an offset.

    Args:
        row: its `input_ids`, `attention_mask` and `entropy`, (1, T), padded on the right.
        positions: t, (n,), n may be 0.
        signs: eps, (n,).
        offsets: of the A of every layer.
        autocast: what it is run in to be differentiated twice; `None` for a central difference, in the precision of
            the weights.
        wrapper: what is run in the place of the base model, where weights are gathered by a pass of it.
    """

    def __init__(
        self,
        scored: ScoredModel,
        adapter_name: str,
        q: float,
        row: dict[str, Tensor],
        positions: Tensor,
        signs: Tensor,
        offsets: Sequence[Tensor],
        autocast: Callable[[], Any] | None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self.wrapper = wrapper
        self.scored, self.adapter_name, self.q, self.autocast = scored, adapter_name, q, autocast
        self.positions, self.signs, self.offsets, self.calls = positions, signs.to(positions.device), offsets, 0
        # what follows is seen by none of them
        length = int(positions.max()) + 1 if len(positions) else int(row["attention_mask"].sum())
        self.row = {name: values[:, :length] for name, values in row.items()}

    def __call__(self) -> Tensor:
        scored, name = self.scored, self.adapter_name
        gating: Any = scored.gating
        self.calls += 1
        device = self.positions.device.type
        with (
            torch.autocast(device, enabled=False) if self.autocast is None else self.autocast(),
            nullcontext() if self.autocast is None else _plain_attention(scored.decoder),
            evaluating(scored.decoder),
            _without_graph(scored.base.get_input_embeddings()),
            _added([layer.alter_A[name] for layer in scored.layers_of(name)], self.offsets),
            gating.supply(name, self.row["entropy"], learns_experts=False, learns_shared=False),
        ):
            # not the adapted model, which accelerate has itself run under autocast
            root = self.wrapper or scored.base
            hidden = scored.hidden_states(self.row["input_ids"], self.row["attention_mask"], root)
            entropy = chunked_tsallis_entropy(hidden[0, self.positions], scored.head, self.q)
        return (self.signs * entropy).sum()

    def keep_step(self, passes: int) -> None:
        """Make up for passes that this row did not need."""
        while self.calls < passes:
            torch.autograd.grad(self(), list(self.offsets), allow_unused=True)


def obstacle_to_second_derivative(function: Callable[[], Tensor], tensors: Sequence[Tensor]) -> str | None:
    """
    What keeps a function of some tensors from being differentiated twice by them; `None` if nothing does.

    Of some operations torch raises an error, but the gradient of others, kernels with a backward of their own, it
    takes for a constant. Such a one shows: what backward gives it depends on the tensors, what it returns does not.
    """
    found: list[str] = []

    def watched() -> Tensor:
        output = function()
        for node in _nodes(output):
            node.register_hook(partial(look, node.name()))
        return output

    def look(name: str, returned: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        depends = any(gradient is not None and gradient.requires_grad for gradient in given)
        if depends and any(gradient is not None and _ends(gradient) for gradient in returned):
            found.append(name)

    try:
        exact_structural_invariance(watched, tensors)
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return f"`{found[0]}` has no second derivative" if found else None


def _ends(gradient: Tensor) -> bool:
    """Whether nothing is known of what a gradient depends on; torch marks what it will not differentiate."""
    return gradient.grad_fn is None or gradient.grad_fn.name().endswith(("::Error", "::NotImplemented"))


def _nodes(output: Tensor) -> set[Any]:
    """The operations that made it."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and not node.name().endswith("AccumulateGrad"):
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return seen


@contextmanager
def _plain_attention(decoder: Any) -> Iterator[None]:
    """Inside, attention is made of plain operations, which have second derivatives as no fused kernel has."""
    config = decoder.config
    before = config._attn_implementation
    if before not in ("sdpa", "eager", None):
        config._attn_implementation = "eager"  # which every decoder of transformers has
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        config._attn_implementation = before


@contextmanager
def _without_graph(embeddings: nn.Module) -> Iterator[None]:
    """Inside, embeddings are constants, also where gradient checkpointing has them require gradients."""
    with embeddings.register_forward_hook(lambda module, args, output: output.detach()):
        yield


@contextmanager
def _added(projections: Sequence[nn.Module], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Inside, every A is A + offset."""

    def hook_for(offset: Tensor) -> Any:
        return lambda module, args, output: output + F.linear(args[0], offset.to(args[0].dtype))

    with ExitStack() as stack:
        for projection, offset in zip(projections, offsets, strict=True):
            stack.enter_context(projection.register_forward_hook(hook_for(offset)))
        yield
