# SPDX-License-Identifier: Apache-2.0
"""One step of the training: pairs of rows, a forget and a retain term, each a mean over the step, and its logs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from alter_peft.data import PairDataset, PairSampler
from alter_peft.losses import RETAIN_LOSSES
from alter_peft.scoring import ScoredModel

from .batch import TokenMasks, count_terms, token_masks, token_shares, token_sums, without_rows
from .inside import Base, Seen, tapped
from .saving import SavingTrainer
from .targets import Measured
from .terms import forget_term, retain_term, rivals_in


class PairTrainer(SavingTrainer):
    """
    [`~trl.SFTTrainer`] whose steps are of pairs of rows, one to forget and one to retain.

    **Attributes**, which a subclass sets:
        - **scored** ([`ScoredModel`]) -- The model.
        - **measured** ([`Measured`]) -- What the forget loss needs of the rows.
        - **_base** ([`Base`]) -- The base model beside it.
    """

    args: Any
    model: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    _signature_columns: Any

    loss_is_scaled_for_ga: Any = True
    scored: ScoredModel
    measured: Measured
    _base: Base
    _token_sums: dict[str, float]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]]:
        data: PairDataset = self.train_dataset
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = PairSampler(len(data.forget), len(data.retain), rows, self.args.seed)
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "forget", "retain", "alternate"})

    @property
    def ended(self) -> bool:
        """Whether no step is left, though there may be epochs."""
        return False

    # ---- one step ---------------------------------------------------------------------------------------------------

    @property
    def num_experts(self) -> int:
        """What rows are told apart by: retained or to be forgotten."""
        return 2

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {"forget": self.args.forget_weight, "retain": self.args.retain_weight}

    def _masks(self, batch: dict[str, Tensor]) -> TokenMasks:
        return token_masks(batch, None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Counts what each term is a mean of over the whole step: all accumulated batches, all processes."""
        if self.ended or 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end: no step is left
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        weights = self.args.forget_weight, self.args.retain_weight
        counted = [
            count_terms(batch, self._masks(batch), self.args.loss, weights, self.num_experts) for batch in batches
        ]
        counts = torch.stack(counted).sum(dim=0)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.to(device).unsqueeze(0)).sum(dim=0)
        forget, retain = counts[:2].clamp(min=1).tolist()
        self.experts_with_rows = (counts[2:] > 0).tolist()
        return batches, {"forget": forget, "retain": retain}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the parent's, which under DeepSpeed would round S_q to the model's own precision."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if "entropy" in inputs:
            prepared["entropy"] = inputs["entropy"].to(prepared["entropy"].device)
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted terms of a batch of forget and retain rows; the parent's loss on any other (evaluation)."""
        if "expert" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        terms = self._terms(model, inputs, self._masks(inputs), num_items_in_batch)
        self._record(self._sums, terms)
        loss: Any = sum(self.weights[name] * value for name, value in terms.items())
        loss = loss * self.accelerator.num_processes  # DDP averages gradients, the counts are of all processes
        return (loss, None) if return_outputs else loss

    def _terms(
        self, model: nn.Module, inputs: dict[str, Any], masks: TokenMasks, count: dict[str, float]
    ) -> dict[str, Tensor]:
        """The forget and the retain term, each divided by what the whole step has of its tokens or rows."""
        if self.args.retain_weight == 0:  # retained rows teach nothing: no pass for them
            rests = inputs["expert"] == 0
            inputs, masks = without_rows(inputs, rests), TokenMasks(*(mask[~rests] for mask in masks))
        seen = self._see(model, inputs)
        with self.accelerator.autocast():
            hidden, labels = seen.hidden[masks.labelled], inputs["labels"][:, 1:][masks.labelled]
            rivals = rivals_in(inputs, masks, self.args.loss, self.measured)
            scores, log_rivals = self.scored.score_with(hidden, labels, rivals)
            loss, options = self.args.loss, self.args.loss_options
            forget = forget_term(scores, inputs, masks, loss, options, self.measured, seen, self._base, log_rivals)
            retain = scores.log_prob.new_zeros(())
            if self.args.retain_weight > 0:
                retain = retain_term(scores, seen, inputs, masks, RETAIN_LOSSES[self.args.retain_loss], self._base)
        self._sums = token_sums(scores, masks, inputs["expert"], self._gates())
        return {"forget": forget / count["forget"], "retain": retain / count["retain"]}

    def _see(self, model: nn.Module, inputs: dict[str, Any]) -> Seen:
        layer = self._base.layer
        with tapped(None if layer is None else self.scored.stack.layers[layer]) as found:
            hidden = self.hidden_states(model, inputs)
        return Seen(hidden[:, :-1], found[0][:, -hidden.shape[1] :][:, :-1] if found else None)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The decoder's last hidden states (B, T, k)."""
        return self.scored.hidden_states(inputs["input_ids"], inputs["attention_mask"], model)

    def _gates(self) -> Tensor | None:
        """The gates of the last pass, (B, T, 1+N), where there is a router."""
        return None

    # ---- logs -------------------------------------------------------------------------------------------------------

    def _record(self, sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Totals over all processes, until the next log, so that shares are of tokens; losses add up over a step."""
        stacked = torch.stack([value.detach().float() for value in (*sums.values(), *losses.values())])
        totals = self.accelerator.reduce(stacked, "sum").tolist()
        for name, total in zip(sums, totals, strict=False):
            self._token_sums[name] = self._token_sums.get(name, 0.0) + total
        for name, value in zip(losses, totals[len(sums) :], strict=True):
            self._metrics["train"][f"loss/{name}"].append(value * self.current_gradient_accumulation_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._token_sums:
            logs |= token_shares(self._token_sums)
            self._token_sums = {}
        super().log(logs, start_time)
