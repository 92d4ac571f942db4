# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alter_peft.entropy import chunked_tsallis_entropy
from alter_peft.losses import structural_invariance
from alter_peft.tuner.gating import evaluating


if TYPE_CHECKING:
    from .trainer import AlterUnlearnTrainer


class StructuralTerm:
    """
    L_struct of Eq. 8 on a batch: the mean of ||grad_A S_q(x_t)||^2 over its high-entropy answer tokens.

    Evaluated every `structural_interval` steps, with its gradient times that number (lazy regularisation, as StyleGAN2
    has it, https://huggingface.co/papers/1912.04958). Row by row, with signs that depend on the seed, the step and the
    row alone, so that accumulation and several processes add up to the very same term. In float32 and without
    dropout, which the central difference inside needs.
    """

    def __init__(self, trainer: AlterUnlearnTrainer) -> None:
        self.trainer = trainer

    def due(self) -> bool:
        """Whether the present step evaluates the term; A moves on these steps alone."""
        args = self.trainer.args
        return args.structural_weight > 0 and (self.trainer.state.global_step + 1) % args.structural_interval == 0

    def __call__(self, inputs: dict[str, Any], count: float) -> Tensor:
        """The term's value, with its gradient in A; `count` is the number of high-entropy tokens of the step."""
        shared: list[Tensor] = list(self.trainer.shared_matrices)
        # every A is in every graph, since DDP waits for all gradients
        anchor = sum((A.sum() for A in shared), torch.zeros((), device=inputs["input_ids"].device)) * 0.0
        if not self.due():
            return anchor
        value = torch.zeros_like(anchor)
        gradients = [torch.zeros_like(A) for A in shared]
        for row in self._rows(inputs):
            term = structural_invariance(row, shared)
            value += term.value
            for total, gradient in zip(gradients, term.gradients, strict=True):
                total += gradient
        interval = self.trainer.args.structural_interval
        # a linear function of A whose gradient is the term's: it goes through accumulation and DDP like any loss
        linear = sum(((A * G).sum() for A, G in zip(shared, gradients, strict=True)), anchor) * (interval / count)
        return linear - linear.detach() + value / count

    def _rows(self, inputs: dict[str, Any]) -> list[_SignedEntropy]:
        high = self.trainer.objective.masks(inputs).high
        rows = high.any(dim=1).nonzero().flatten().tolist()
        return [_SignedEntropy(self.trainer, inputs, row, high[row].nonzero().flatten()) for row in rows]


class _SignedEntropy:
    """f(A) = sum_t eps_t S_q(x_t) over the high-entropy answer tokens of one row."""

    def __init__(self, trainer: AlterUnlearnTrainer, inputs: dict[str, Any], row: int, positions: Tensor) -> None:
        length = int(inputs["attention_mask"][row].sum())
        names = ("input_ids", "attention_mask", "entropy")
        self.inputs = {name: inputs[name][row : row + 1, :length] for name in names}
        self.trainer, self.positions = trainer, positions
        seed = (trainer.args.seed * 1_000_003 + trainer.state.global_step) * 1_000_003 + int(inputs["row_id"][row])
        generator = torch.Generator().manual_seed(seed % 2**63)
        signs = torch.randint(0, 2, (len(positions),), generator=generator) * 2 - 1
        self.signs = signs.to(positions.device)

    def __call__(self) -> Tensor:
        trainer, inputs = self.trainer, self.inputs
        with (
            torch.autocast(self.positions.device.type, enabled=False),
            evaluating(trainer.decoder),
            trainer.gating.supply(entropy=inputs["entropy"], learns_experts=False),
        ):
            hidden = trainer.decoder(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )[0]
            entropy = chunked_tsallis_entropy(hidden[0, self.positions], trainer.head, trainer.args.structural_q)
        return (self.signs * entropy).sum()
