# SPDX-License-Identifier: Apache-2.0
"""The cluster start of the forget experts, `AlterConfig(init_weights="cluster")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from alter_peft.data import PairCollator
from alter_peft.losses import kl_to_base_loss
from alter_peft.scoring import ScoredModel
from alter_peft.tuner.base_pass import evaluating
from alter_peft.tuner.layer import AlterLayer


KL_LIMIT = 1e-3  # nats a token, the mean over the answer tokens of the forget rows
FIRST_DAMPING = 0.1
MAX_HALVINGS = 30

# (adapted layer, its sub-domain d = 1..N) -> the direction of B_f^d; all are scaled by one epsilon
Directions = dict[nn.Parameter, Tensor]
Batches = Callable[[], Iterator[dict[str, Tensor]]]


def start_from_clusters(scored: ScoredModel, adapter_name: str, forget: Dataset, batch_size: int) -> float:
    r"""
    Start every forget expert from the centre of its sub-domain.

    The paper speaks of a start from cluster centres, but gives no formula; this is our reading of it. With mu_d the
    mean input of a layer over the positions that predict an answer token of sub-domain d, in the base model,

        B_f^d = -epsilon (W0 mu_d) (A mu_d)^T / (||A mu_d||^2 s),

    so that s B_f^d A mu_d = -epsilon W0 mu_d: a rank-one damping of the layer's response to the centre. One epsilon
    serves all layers and sub-domains: 0.1, halved until the start adds less than `KL_LIMIT` to KL(base || adapted),
    the mean over the answer tokens of the forget rows under the router's own gates.

    Only experts that are still all zero are written: a loaded or resumed adapter keeps what it has learned. Centres
    are running sums, so memory doesn't grow with the data.

    Args:
        scored: a model with an ALTER adapter of that name, its router fitted (phase I).
        forget: the forget rows, with `input_ids`, `labels`, `expert` and `entropy`.

    Returns:
        The KL reached, in nats a token.
    """
    batches = _batches(forget, batch_size, scored.device)
    with torch.no_grad(), evaluating(scored.model):
        directions = _directions(_centres(scored, adapter_name, batches), adapter_name)
        before = kl = _mean_kl(scored, adapter_name, batches)
        if not directions:
            return kl
        damping = FIRST_DAMPING
        for _ in range(MAX_HALVINGS):
            _write(directions, damping)
            kl = _mean_kl(scored, adapter_name, batches)
            if kl - before < KL_LIMIT:
                return kl
            damping /= 2
        _write(directions, 0.0)
        return before


def _centres(scored: ScoredModel, adapter_name: str, batches: Batches) -> dict[AlterLayer, Tensor]:
    """mu_1..mu_N of every adapted layer, (N, k) float32; zero where a sub-domain has no rows."""
    layers, sums = scored.layers_of(adapter_name), dict[AlterLayer, Tensor]()
    count = len(layers[0].alter_B[adapter_name].experts()) - 1
    tokens = torch.zeros(count, 1)
    for batch in batches():
        # (N, B, T): the positions of each sub-domain that predict an answer token
        share = torch.stack([_answers(batch) & (batch["expert"] == d).unsqueeze(1) for d in range(1, count + 1)])
        with _summing(layers, share.flatten(1).float(), sums), scored.as_base():
            scored.base_hidden_states(batch["input_ids"], batch["attention_mask"])
        tokens += share.sum(dim=(1, 2)).unsqueeze(1).cpu()
    return {layer: total / tokens.clamp(min=1).to(total.device) for layer, total in sums.items()}


@contextmanager
def _summing(layers: list[AlterLayer], share: Tensor, sums: dict[AlterLayer, Tensor]) -> Iterator[None]:
    """While inside, adds each layer's inputs, weighted by `share` (N, B * T), to `sums` (N, k)."""

    def add(layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if x.shape[0] == share.shape[1]:  # a layer that sees other positions (a pooled input) has no centre
            sums[layer] = sums.get(layer, 0) + share.to(x.device) @ x

    with ExitStack() as stack:
        for layer in layers:
            assert isinstance(layer, nn.Module)
            stack.enter_context(layer.register_forward_pre_hook(add))
        yield


def _directions(centres: dict[AlterLayer, Tensor], adapter_name: str) -> Directions:
    """-(W0 mu_d) (A mu_d)^T / (||A mu_d||^2 s) for every forget expert that is all zero and has a centre."""
    name, directions = adapter_name, {}
    for layer, means in centres.items():
        base: Any = layer.get_base_layer()
        A = layer.alter_A[name].get_parameter("weight")
        bank: Any = layer.alter_B[name]
        centre = means.to(base.weight.dtype)
        response = (base(centre) - base(torch.zeros_like(centre))).to(A.dtype)  # W0 mu_d without the bias, (N, d)
        h = means.to(A.dtype) @ A.T  # A mu_d, (N, r)
        for expert, y, z in zip(bank.experts()[1:], response, h, strict=True):
            if z.any() and not expert.any():
                directions[expert] = -torch.outer(y, z) / (z.dot(z) * layer.scaling[name])
    return directions


def _write(directions: Directions, damping: float) -> None:
    for expert, direction in directions.items():
        expert.copy_(damping * direction)


def _mean_kl(scored: ScoredModel, adapter_name: str, batches: Batches) -> float:
    """KL(base || adapted), the mean over the answer tokens, with the gates as in training."""
    gating: Any = scored.gating
    total, tokens = 0.0, 0
    for batch in batches():
        answers, of = _answers(batch), (batch["input_ids"], batch["attention_mask"])
        with gating.supply(adapter_name, batch["entropy"], learns_shared=False):
            hidden = scored.hidden_states(*of)[answers]
        with scored.as_base():
            base = scored.base_hidden_states(*of)[answers]
        total += kl_to_base_loss(hidden, base, scored.head).sum().item()
        tokens += len(hidden)
    return total / tokens


def _answers(batch: dict[str, Tensor]) -> Tensor:
    """bool (B, T), True at t where the token at t + 1 is labelled."""
    labelled = batch["labels"][:, 1:] != -100
    return torch.nn.functional.pad(labelled, (0, 1), value=False)


def _batches(forget: Dataset, batch_size: int, device: torch.device) -> Batches:
    """The rows in their order, padded on the right, as often as they are asked for."""

    def batches() -> Iterator[dict[str, Tensor]]:
        collator = PairCollator(pad_token_id=0)
        for start in range(0, len(forget), max(1, batch_size)):
            rows = [{**forget[i], "row_id": i} for i in range(start, min(start + max(1, batch_size), len(forget)))]
            yield {name: value.to(device) for name, value in collator.collate_rows(rows).items()}

    return batches
