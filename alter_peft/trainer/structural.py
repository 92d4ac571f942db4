# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType, logging
from torch import Tensor, nn

from alter_peft.losses import exact_structural_invariance, structural_invariance
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.expert_bank import SharedProjection

from .batch import TokenMasks
from .config import AlterUnlearnConfig
from .distributed import (
    gathers_layers,
    is_sharded,
    local_shard,
    shard_like,
    uses_deepspeed,
    uses_fsdp,
    zero3_gathered,
)
from .signed_entropy import SignedEntropy, obstacle_to_second_derivative


logger = logging.get_logger(__name__)

POSITIONS = 512  # of a row that are looked at: a second derivative holds the attention weights of all of them
TOKENS = 64  # of a row that are looked at: their logits are held together
STEP = 1e-3  # displacement of A relative to its norm (`structural_invariance`)
PASSES = 3  # of a row with a central difference: at A and on either side of it


class Drawn(NamedTuple):
    """
    The row that a step looks at.

    row_id: which.
    tokens: its high-entropy answer tokens, those of all its copies in the step together.
    """

    row_id: int
    tokens: int


class StructuralTerm:
    """
    L_struct of Eq. 8: the mean of ||grad_A S_q(x_t)||^2 over the high-entropy answer tokens of a step, by an unbiased
    estimate.

    The tokens are those of the step's forget and retain rows, whatever `retain_weight` is, within a row's first
    `POSITIONS` positions. One row is drawn, with a probability in proportion to how many of them it has, and the mean
    over at most `TOKENS` of its own, drawn too, is the estimate: no factor is needed. The draw is the least of one
    exponential variable for each row, whose rate is the row's count (Efraimidis and Spirakis, "Weighted random
    sampling with a reservoir", 2006); it and the signs inside depend on the seed, the step and the row's id alone, so
    that accumulation and several processes have the very same term.

    Evaluated every `structural_interval` steps, with its gradient times that number (lazy regularisation, as StyleGAN2
    has it, https://huggingface.co/papers/1912.04958), without dropout. The gradient is exact, by double backward in
    the training's own precision. Where layers gather their weights as they run (FSDP2, ZeRO-3), and where something
    in the model cannot be differentiated twice, it is a central difference in float32.

    Args:
        scored: the model.
        adapter_name: whose A it is about.
        args: its weight, order, interval and seed.
        accelerator: of the training.

    Attributes:
        weight: lambda; 0 where the term is left out, which `begin` finds.
        exact: whether its gradient is exact.
        drawn: the row that the present step looks at; `None` if it looks at none.
    """

    def __init__(
        self, scored: ScoredModel, adapter_name: str, args: AlterUnlearnConfig, accelerator: Accelerator
    ) -> None:
        self.scored, self.adapter_name, self.args, self.accelerator = scored, adapter_name, args, accelerator
        self.weight, self.exact = args.structural_weight, True
        self.drawn: Drawn | None = None

    def begin(self, high_tokens: int, threshold: float) -> None:
        """
        Choose how the gradient is found, once phase I is through, or leave the term out and say so.

        Args:
            high_tokens: answer tokens of all of the data whose entropy is above the threshold.
        """
        if self.weight == 0:
            return
        if high_tokens == 0:
            self.weight = 0.0
            logger.info(
                f"No answer token has an entropy above the threshold of {threshold:.4g}, so that L_struct has nothing "
                "to look at: A rests. Set `entropy_quantile` to have it."
            )
        else:
            self._choose_method()

    def _choose_method(self) -> None:
        reason = "FSDP2 and ZeRO-3 free the weights that a second derivative needs"
        if not gathers_layers(self.accelerator):
            obstacle = self._obstacle()
            if obstacle is None:
                return
            reason = f"the model cannot be differentiated twice ({obstacle})"
        self.exact = False
        dtype = self.scored.base.get_output_embeddings().weight.dtype
        # autocast cannot be left where the weights themselves are of the lower precision
        rounds = uses_fsdp(self.accelerator) or uses_deepspeed(self.accelerator)
        mixed = self.accelerator.mixed_precision if rounds else "no"
        if dtype in (torch.float32, torch.float64) and mixed == "no":
            logger.info(f"L_struct's gradient is a central difference: {reason}.")
            return
        logger.warning(
            f"L_struct is left out (`structural_weight=0`) and A stays as it is: {reason}, and a central difference "
            f"is noise in {dtype if mixed == 'no' else mixed}. Load the model with `dtype=torch.float32` (under FSDP "
            "and DeepSpeed also `mixed_precision: 'no'`) to have it."
        )
        self.weight = 0.0  # not written to the user's arguments, which may serve for another model

    def _obstacle(self) -> str | None:
        """What keeps the model from being differentiated twice, found on four tokens; `None` if nothing does."""
        ids = torch.arange(1, 5, device=self.scored.device).unsqueeze(0)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "entropy": torch.zeros(ids.shape, device=ids.device),
        }
        offsets = self._offsets(ids.device)
        return obstacle_to_second_derivative(self._signed(inputs, ids[0, :1], torch.ones(1), offsets), offsets)

    def draw(
        self, batches: Sequence[dict[str, Any]], masks: Callable[[dict[str, Any]], TokenMasks], global_step: int
    ) -> None:
        """
        Draw the row that the step after so many looks at; all processes call this together.

        Args:
            batches: this process's own of the step.
            masks: batch -> its masks.
        """
        self.drawn = None
        if self.weight == 0 or (global_step + 1) % self.args.structural_interval:
            return
        counted = [torch.stack([batch["row_id"], _within(masks(batch).high).sum(dim=1)], dim=1) for batch in batches]
        found = torch.cat(counted)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.pad_across_processes(found.to(self.accelerator.device))
            found = self.accelerator.gather(found)
        tokens: Counter[int] = Counter()
        for row_id, count in found.tolist():
            tokens[row_id] += count
        waits = {
            row_id: self._random(global_step, row_id, 0).standard_exponential() / count
            for row_id, count in tokens.items()
            if count
        }
        if waits:
            row_id = min(waits, key=lambda row_id: waits[row_id])
            self.drawn = Drawn(row_id, tokens[row_id])

    def __call__(self, inputs: dict[str, Any], high: Tensor, global_step: int) -> Tensor:
        """
        The term's value, with its gradient in A, as far as this batch has the row that was drawn.

        Args:
            high: the high-entropy answer tokens, bool (B, T-1).
        """
        zero = torch.zeros((), device=inputs["input_ids"].device)
        rows = self._rows(inputs, _within(high))
        if not rows:
            if self.weight == 0 or self.accelerator.distributed_type == DistributedType.NO:
                return zero
            # every A is in every graph all the same, since DDP waits for all gradients
            return sum((_inner_product(A, None) for A in self._projections), zero)
        value, gradients = self._sum_over_rows(inputs, rows, global_step)
        products = map(_inner_product, self._projections, self._as_held(gradients))
        # a linear function of A whose gradient is the term's: it goes through accumulation and DDP like any loss
        linear = sum(products, zero) * self.args.structural_interval
        return linear - linear.detach() + value

    @property
    def shared(self) -> list[nn.Parameter]:
        """A of every adapted layer, as it is now: FSDP replaces parameters."""
        return [A.get_parameter("weight") for A in self._projections]

    @property
    def _projections(self) -> list[SharedProjection]:
        return [layer.alter_A[self.adapter_name] for layer in self.scored.layers_of(self.adapter_name)]

    def _random(self, global_step: int, row_id: int, use: int) -> np.random.Generator:
        """Of this row in this step: 0 for the draw, 1 for what is made of the row that was drawn."""
        return np.random.default_rng((self.args.seed, global_step, row_id, use))

    def _rows(self, inputs: dict[str, Any], high: Tensor) -> list[tuple[int, Tensor] | None]:
        """Copies of the row that was drawn, each with its high positions; `None` for a pass that others need."""
        if self.drawn is None:
            return []
        own = ((inputs["row_id"] == self.drawn.row_id) & high.any(dim=1)).nonzero().flatten().tolist()
        rows: list[tuple[int, Tensor] | None] = [(row, high[row].nonzero().flatten()) for row in own]
        if gathers_layers(self.accelerator):  # by all processes together, so all make equally many passes
            count = torch.tensor([len(rows)], device=high.device)
            rows += [None] * (int(self.accelerator.gather(count).max()) - len(rows))
        return rows

    def _offsets(self, device: torch.device) -> list[Tensor]:
        """
        A zero for each A, which stands for it: what is differentiated by, and displaced, is what is added to A.

        FSDP shards A itself, and each row would displace it differently; this every process has whole, and no other
        sees it.
        """
        shapes = [(A.out_features, A.in_features) for A in self._projections]
        return [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]

    def _sum_over_rows(
        self, inputs: dict[str, Any], rows: Sequence[tuple[int, Tensor] | None], global_step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The term of this process's rows, and its gradient in every whole A."""
        assert self.drawn is not None
        device = inputs["input_ids"].device
        offsets = self._offsets(device)
        value = torch.zeros((), device=device)
        gradients = [torch.zeros_like(offset) for offset in offsets]
        length = 0.0 if self.exact else STEP * max(1.0, self._norm_of_shared())
        for row in rows:
            place, high = row or (0, torch.empty(0, dtype=torch.long, device=device))
            random = self._random(global_step, self.drawn.row_id, 1)
            positions = high[torch.as_tensor(random.permutation(len(high))[:TOKENS], device=device)]
            signs = torch.as_tensor(random.choice([-1.0, 1.0], len(positions)), dtype=torch.float32)
            one = {name: inputs[name][place : place + 1] for name in ("input_ids", "attention_mask", "entropy")}
            signed = self._signed(one, positions, signs, offsets)
            term = (
                exact_structural_invariance(signed, offsets)
                if self.exact
                else structural_invariance(signed, offsets, length)
            )
            if gathers_layers(self.accelerator):
                signed.keep_step(PASSES)
            # a mean over the positions, and over the row's copies
            share = len(high) / (self.drawn.tokens * max(1, len(positions)))
            value += share * term.value
            for total, gradient in zip(gradients, term.gradients, strict=True):
                total += share * gradient
        return value, gradients

    def _signed(
        self, row: dict[str, Tensor], positions: Tensor, signs: Tensor, offsets: Sequence[Tensor]
    ) -> SignedEntropy:
        autocast = self.accelerator.autocast if self.exact else None
        scored, name, q = self.scored, self.adapter_name, self.args.structural_q
        wrapper = scored.model if gathers_layers(self.accelerator) else None
        return SignedEntropy(scored, name, q, row, positions, signs, offsets, autocast, wrapper)

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


def _within(high: Tensor) -> Tensor:
    """Those of the positions (B, T-1) that are looked at."""
    near: Tensor = high[:, :POSITIONS]
    return near


def _inner_product(projection: SharedProjection, G: Tensor | None) -> Tensor:
    """sum A G, entry by entry, as a function of A, or of this process's part of it; without a G, 0."""
    A = projection.weight
    if is_sharded(A):
        return local_shard(A).sum() * 0.0 if G is None else (local_shard(A) * G).sum()
    rows = A.new_zeros(1, projection.in_features) if G is None else G.to(A.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        product: Tensor = projection(rows)  # in its own forward ZeRO-3 has gathered A
    return product.diagonal().sum()
