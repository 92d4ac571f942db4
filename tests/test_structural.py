# SPDX-License-Identifier: Apache-2.0
"""The structural term as the trainer's step has it, against exact double backward through the whole model."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from conftest import make_llama
from trainer_setup import make_trainer
from transformers import TrainerCallback

from alter_peft.data import PairDataset
from alter_peft.entropy import tsallis_entropy
from alter_peft.losses import structural_invariance


Q, WEIGHT, INTERVAL = 0.5, 0.01, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


class Steps(TrainerCallback):
    """Each step's batches, the gradient of every A before the optimiser's step, and what `inspect` makes of them."""

    def __init__(self, inspect=None) -> None:
        self.inspect = inspect or (lambda trainer, batches: None)
        self.batches: list[dict] = []
        self.gradients: list[list[torch.Tensor]] = []
        self.inspected: list = []

    def attach(self, trainer) -> None:
        self.trainer, collate = trainer, trainer.data_collator

        def recording(examples):
            self.batches.append(collate(examples))
            return dict(self.batches[-1])

        trainer.data_collator = recording
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        size = args.gradient_accumulation_steps
        batches = self.batches[state.global_step * size :][:size]
        self.inspected.append(self.inspect(self.trainer, batches))
        found = [A.grad for A in self.trainer.shared_matrices]
        self.gradients.append([None if gradient is None else gradient.clone() for gradient in found])


def run(tmp_path, tokenizer, high: int, dtype=torch.float64, inspect=None, **options) -> Steps:
    """Steps of four forget rows, `high` answer tokens of each row having high entropy; every second has the term."""
    model = make_llama(len(tokenizer), attn_implementation="eager").to(dtype)
    options = {"per_device_train_batch_size": 4, "max_steps": 2, **options}
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, adapter={"entropy_quantile": 0.6},
        structural_interval=INTERVAL, structural_weight=WEIGHT, structural_q=Q, max_grad_norm=1e9, **options,
    )  # fmt: skip
    trainer.prepare()
    data, threshold = trainer.train_dataset, trainer.alter_config.entropy_threshold

    def with_few_high(row):
        first = next(t for t, label in enumerate(row["labels"]) if label != -100)
        places = range(first, first + high)  # S at t - 1 is of the label at t
        return {"entropy": [threshold + 0.1 * ((t + 1 in places) - 0.5) for t in range(len(row["labels"]))]}

    trainer.train_dataset = PairDataset(data.forget.map(with_few_high), data.retain.map(with_few_high))
    steps = Steps(inspect)
    steps.attach(trainer)
    trainer.train()
    return steps


def entropies(trainer, batch: dict, row: int) -> torch.Tensor:
    """S_q of the row's high-entropy answer tokens, from the logits of the whole model."""
    high = (batch["entropy"][row, :-1] > trainer.alter_config.entropy_threshold) & (batch["labels"][row, 1:] != -100)
    with trainer.gating.supply(entropy=batch["entropy"][row : row + 1]):
        logits = trainer.model(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            use_cache=False,
        ).logits
    return tsallis_entropy(logits[0, :-1][high], Q)


def signed_sums(trainer, batches: list[dict], signs: dict[int, tuple[int, ...]]) -> list[Callable[[], torch.Tensor]]:
    """sum_t eps_t S_q(x_t) of each row; `signs` maps a row's id to its eps."""
    return [
        lambda batch=batch, row=row, eps=signs[row_id]: (
            torch.tensor(eps).double() @ entropies(trainer, batch, row).double()
        )
        for batch in batches
        for row, row_id in enumerate(batch["row_id"].tolist())
    ]


def exact(trainer, batches: list[dict], signs: dict[int, tuple[int, ...]]) -> tuple[float, list[torch.Tensor]]:
    """The mean of ||grad_A sum_t eps_t S_q(x_t)||^2 and the weighted, lazy gradient, by double backward."""
    total, gradients = 0.0, [torch.zeros_like(A) for A in trainer.shared_matrices]
    count = sum(len(signs[row_id]) for batch in batches for row_id in batch["row_id"].tolist())
    for signed in signed_sums(trainer, batches, signs):
        first = torch.autograd.grad(signed(), trainer.shared_matrices, create_graph=True)
        value = sum(g.square().sum() for g in first)
        total += value.item()
        for part, gradient in zip(gradients, torch.autograd.grad(value, trainer.shared_matrices), strict=True):
            part += gradient
    return total / count, [part * WEIGHT * INTERVAL / count for part in gradients]


def by_difference(trainer, batches: list[dict], signs: dict[int, tuple[int, ...]]) -> list[torch.Tensor]:
    """The same gradient by `structural_invariance`."""
    count = sum(len(signs[row_id]) for batch in batches for row_id in batch["row_id"].tolist())
    terms = [structural_invariance(f, trainer.shared_matrices) for f in signed_sums(trainer, batches, signs)]
    return [sum(parts) * WEIGHT * INTERVAL / count for parts in zip(*(t.gradients for t in terms), strict=True)]


def relative_error(actual, expected) -> float:
    error = sum((a - e).double().square().sum().item() for a, e in zip(actual, expected, strict=True))
    return math.sqrt(error / sum(e.double().square().sum().item() for e in expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_is_that_of_exact_double_backward(tmp_path, tokenizer, dtype):
    """One token a row has no sign to guess. The relative error was 2e-4 at most; transformers' norms are float32."""
    ones = defaultdict(lambda: (1,))

    def inspect(trainer, batches):
        return exact(trainer, batches, ones), by_difference(trainer, batches, ones)

    steps = run(tmp_path, tokenizer, high=1, dtype=dtype, inspect=inspect)
    assert all(gradient is None for gradient in steps.gradients[0])  # it is not due
    (value, expected), difference = steps.inspected[1]
    assert relative_error(steps.gradients[1], difference) < 5e-4
    assert relative_error(steps.gradients[1], expected) < 1e-3
    log = [log["loss/structural"] for log in steps.trainer.state.log_history if "loss/structural" in log]
    assert log == [0.0, pytest.approx(value, rel=1e-3)]


def test_accumulated_batches_add_up_to_the_gradient_of_one(tmp_path, tokenizer):
    whole = run(tmp_path, tokenizer, high=3)
    parts = run(tmp_path, tokenizer, high=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert len(parts.batches) == 2 * len(whole.batches) == 4
    assert relative_error(parts.gradients[1], whole.gradients[1]) < 1e-3


def test_signs_differ_from_row_to_row_and_from_step_to_step(tmp_path, tokenizer):
    """One choice of eps explains the gradient; none of the others does."""
    choices = list(itertools.product([(1, 1), (1, -1)], repeat=2))

    def inspect(trainer, batches):
        if trainer.shared_matrices[0].grad is None:
            return None
        (batch,) = batches
        errors = []
        for chosen in choices:
            signs = dict(zip(batch["row_id"].tolist(), chosen, strict=True))
            errors.append(relative_error([A.grad for A in trainer.shared_matrices], exact(trainer, batches, signs)[1]))
        return errors

    steps = run(tmp_path, tokenizer, high=2, inspect=inspect, per_device_train_batch_size=1, max_steps=10)
    found = []
    for errors in steps.inspected[1::2]:
        best = min(errors)
        assert best < 5e-3 and sorted(errors)[1] > 10 * best
        found.append(choices[errors.index(best)])
    forget, retain = zip(*found, strict=True)
    assert len(set(forget)) == len(set(retain)) == 2 and forget != retain
