# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from alter_peft.entropy import chunked_tsallis_entropy
from alter_peft.losses import structural_invariance
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.base_pass import evaluating
from alter_peft.tuner.expert_bank import SharedProjection

from .config import AlterUnlearnConfig
from .distributed import gathers_layers, is_sharded, local_shard, shard_like, zero3_gathered


STEP = 1e-3  # displacement of A relative to its norm (`structural_invariance`)
PASSES = 3  # of a row with a gradient: at A and on either side of it


class StructuralTerm:
    """
    L_struct of Eq. 8 on a batch: the mean of ||grad_A S_q(x_t)||^2 over its high-entropy answer tokens.

    Evaluated every `structural_interval` steps, with its gradient times that number (lazy regularisation, as StyleGAN2
    has it, https://huggingface.co/papers/1912.04958). Row by row, with signs that depend on the seed, the step and the
    row alone, so that accumulation and several processes add up to the very same term. In float32 and without
    dropout, which the central difference inside needs.

    Args:
        scored: the model.
        adapter_name: whose A it is about.
        args: its order, interval and seed.
        weight: lambda; 0 leaves it out.
        accelerator: of the training.
    """

    def __init__(
        self, scored: ScoredModel, adapter_name: str, args: AlterUnlearnConfig, weight: float, accelerator: Accelerator
    ) -> None:
        self.scored, self.adapter_name, self.args, self.weight = scored, adapter_name, args, weight
        self.accelerator = accelerator

    def due(self, global_step: int) -> bool:
        """Whether the step after so many evaluates the term; A moves on these steps alone."""
        return self.weight > 0 and (global_step + 1) % self.args.structural_interval == 0

    def __call__(self, inputs: dict[str, Any], high: Tensor, count: float, global_step: int) -> Tensor:
        """
        The term's value, with its gradient in A.

        Args:
            high: the high-entropy answer tokens, bool (B, T-1).
            count: how many of them the whole step has.
        """
        zero = torch.zeros((), device=inputs["input_ids"].device)
        if not self.due(global_step):  # every A is in every graph all the same, since DDP waits for all gradients
            return sum((_inner_product(A, None) for A in self._projections), zero)
        value, gradients = self._sum_over_rows(inputs, high, global_step)
        products = map(_inner_product, self._projections, self._as_held(gradients))
        # a linear function of A whose gradient is the term's: it goes through accumulation and DDP like any loss
        linear = sum(products, zero) * (self.args.structural_interval / count)
        return linear - linear.detach() + value / count

    @property
    def shared(self) -> list[nn.Parameter]:
        """A of every adapted layer, as it is now: FSDP replaces parameters."""
        return [A.get_parameter("weight") for A in self._projections]

    @property
    def _projections(self) -> list[SharedProjection]:
        return [layer.alter_A[self.adapter_name] for layer in self.scored.layers_of(self.adapter_name)]

    def _sum_over_rows(self, inputs: dict[str, Any], high: Tensor, global_step: int) -> tuple[Tensor, list[Tensor]]:
        """The term of this process's rows, and its gradient in every whole A."""
        # What is displaced is not A, which FSDP shards and each row would displace differently, but what is added to
        # it: every process has all of that, and no other sees it.
        shapes = [(A.out_features, A.in_features) for A in self._projections]
        device = inputs["input_ids"].device
        offsets = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        length = STEP * max(1.0, self._norm_of_shared())
        value = torch.zeros((), device=device)
        gradients = [torch.zeros_like(offset) for offset in offsets]
        for row in self._rows(inputs, high, offsets, global_step):
            term = structural_invariance(row, offsets, length)
            value += term.value
            for total, gradient in zip(gradients, term.gradients, strict=True):
                total += gradient
            if gathers_layers(self.accelerator):
                row.keep_step(PASSES)
        return value, gradients

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(A) for A in self.shared)

    def _norm_of_shared(self) -> float:
        """||A|| over all layers; in float64, so that shards add up to what the whole has."""
        with zero3_gathered(self.shared):
            squares = sum(local_shard(A).detach().double().square().sum() for A in self.shared)
        assert isinstance(squares, Tensor)
        return math.sqrt(float(self.accelerator.reduce(squares, "sum") if self._sharded else squares))

    def _as_held(self, gradients: list[Tensor]) -> list[Tensor]:
        """Each gradient as this process holds its A: DDP adds up by itself, a shard gets what all processes found."""
        if not self._sharded:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = self.accelerator.reduce(flat, "mean")  # the loss is multiplied by their number later
        sums = flat.split([gradient.numel() for gradient in gradients])
        return [shard_like(total.view(A.shape), A) for total, A in zip(sums, self.shared, strict=True)]

    def _rows(
        self, inputs: dict[str, Any], high: Tensor, offsets: Sequence[Tensor], global_step: int
    ) -> list[_SignedEntropy]:
        rows = high.any(dim=1).nonzero().flatten().tolist()
        if gathers_layers(self.accelerator):  # by all processes together, so all make equally many passes
            count = torch.tensor([len(rows)], device=high.device)
            rows += [None] * (int(self.accelerator.gather(count).max()) - len(rows))
        nothing = torch.empty(0, dtype=torch.long, device=high.device)
        return [
            _SignedEntropy(
                self, inputs, offsets, row or 0, nothing if row is None else high[row].nonzero().flatten(), global_step
            )
            for row in rows
        ]


def _inner_product(projection: SharedProjection, G: Tensor | None) -> Tensor:
    """sum A G, entry by entry, as a function of A, or of this process's part of it; without a G, 0."""
    A = projection.weight
    if is_sharded(A):
        return local_shard(A).sum() * 0.0 if G is None else (local_shard(A) * G).sum()
    rows = A.new_zeros(1, projection.in_features) if G is None else G.to(A.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        product: Tensor = projection(rows)  # in its own forward ZeRO-3 has gathered A
    return product.diagonal().sum()


class _SignedEntropy:
    """f(A) = sum_t eps_t S_q(x_t) over the high-entropy answer tokens of one row, at A + offset."""

    def __init__(
        self,
        term: StructuralTerm,
        inputs: dict[str, Any],
        offsets: Sequence[Tensor],
        row: int,
        positions: Tensor,
        global_step: int,
    ) -> None:
        length = int(inputs["attention_mask"][row].sum())
        names = ("input_ids", "attention_mask", "entropy")
        self.inputs = {name: inputs[name][row : row + 1, :length] for name in names}
        self.term, self.offsets, self.positions, self.calls = term, offsets, positions, 0
        seed = (term.args.seed * 1_000_003 + global_step) * 1_000_003 + int(inputs["row_id"][row])
        generator = torch.Generator().manual_seed(seed % 2**63)
        signs = torch.randint(0, 2, (len(positions),), generator=generator) * 2 - 1
        self.signs = signs.to(positions.device)

    def __call__(self) -> Tensor:
        scored, name, inputs = self.term.scored, self.term.adapter_name, self.inputs
        gating: Any = scored.gating
        self.calls += 1
        with (
            torch.autocast(self.positions.device.type, enabled=False),
            evaluating(scored.decoder),
            _added([layer.alter_A[name] for layer in scored.layers_of(name)], self.offsets),
            gating.supply(name, inputs["entropy"], learns_experts=False, learns_shared=False),
        ):
            hidden = scored.hidden_states(inputs["input_ids"], inputs["attention_mask"])
            entropy = chunked_tsallis_entropy(hidden[0, self.positions], scored.head, self.term.args.structural_q)
        return (self.signs * entropy).sum()

    def keep_step(self, passes: int) -> None:
        """Make up for passes that this row did not need."""
        while self.calls < passes:
            torch.autograd.grad(self(), list(self.offsets), allow_unused=True)


@contextmanager
def _added(projections: Sequence[nn.Module], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Inside, every A is A + offset."""

    def hook_for(offset: Tensor) -> Any:
        return lambda module, args, output: output + F.linear(args[0], offset.to(args[0].dtype))

    with ExitStack() as stack:
        for projection, offset in zip(projections, offsets, strict=True):
            stack.enter_context(projection.register_forward_hook(hook_for(offset)))
        yield
