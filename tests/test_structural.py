# SPDX-License-Identifier: Apache-2.0
"""The structural term as the trainer's step has it, against exact double backward through the whole model."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama
from tiny_models import DECODERS, IDS, MASK, adapted
from torch import nn
from torch.autograd.function import once_differentiable
from trainer_setup import adapter_state, forget_rows, make_trainer
from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alter_peft.data import PairDataset
from alter_peft.entropy import tsallis_entropy
from alter_peft.losses import exact_structural_invariance, structural_invariance
from alter_peft.scoring import ScoredModel
from alter_peft.trainer import structural
from alter_peft.trainer.signed_entropy import SignedEntropy, obstacle_to_second_derivative


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


def prepared(tmp_path, tokenizer, high: Callable[[int], int], dtype=torch.float64, **options):
    """A trainer whose row i has `high(i)` answer tokens of high entropy; every second step has the term."""
    model = make_llama(len(tokenizer)).to(dtype)
    options = {"per_device_train_batch_size": 4, "max_steps": 2, **options}
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, adapter={"entropy_quantile": 0.6},
        structural_interval=INTERVAL, structural_weight=WEIGHT, structural_q=Q, max_grad_norm=1e9, **options,
    )  # fmt: skip
    trainer.prepare()
    data, threshold = trainer.train_dataset, trainer.alter_config.entropy_threshold

    def with_few_high(row, i):
        first = next(t for t, label in enumerate(row["labels"]) if label != -100)
        places = range(first, first + high(i))  # S at t - 1 is of the label at t
        return {"entropy": [threshold + 0.1 * ((t + 1 in places) - 0.5) for t in range(len(row["labels"]))]}

    sets = (rows.map(with_few_high, with_indices=True) for rows in (data.forget, data.retain))
    trainer.train_dataset = PairDataset(*sets)
    return trainer


def run(tmp_path, tokenizer, high: int, dtype=torch.float64, inspect=None, **options) -> Steps:
    """Steps of four forget rows, each with so many answer tokens of high entropy."""
    trainer = prepared(tmp_path, tokenizer, lambda i: high, dtype, **options)
    steps = Steps(inspect)
    steps.attach(trainer)
    trainer.train()
    return steps


def entropies(trainer, batch: dict, row: int) -> torch.Tensor:
    """S_q of the row's high-entropy answer tokens, from all logits."""
    high = (batch["entropy"][row, :-1] > trainer.alter_config.entropy_threshold) & (batch["labels"][row, 1:] != -100)
    with (
        trainer.gating.supply(entropy=batch["entropy"][row : row + 1]),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        hidden = trainer.scored.decoder(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            use_cache=False,
        )[0]
        logits = trainer.scored.head(hidden)
    return tsallis_entropy(logits[0, :-1][high], Q)


def exact(trainer, batches: list[dict], signs: dict[int, tuple[int, ...]]) -> tuple[float, list[torch.Tensor]]:
    """The mean over the drawn row's tokens of ||grad_A sum_t eps_t S_q(x_t)||^2, and the weighted, lazy gradient.

    `signs` maps a row's id to its eps.
    """
    drawn = trainer._structural.drawn
    batch, row = next(
        (batch, row) for batch in batches for row, i in enumerate(batch["row_id"].tolist()) if i == drawn.row_id
    )
    eps = torch.tensor(signs[drawn.row_id]).double()
    signed = eps @ entropies(trainer, batch, row).double()
    first = torch.autograd.grad(signed, trainer.shared_matrices, create_graph=True)
    value = sum(g.square().sum() for g in first) / len(eps)
    gradients = torch.autograd.grad(value, trainer.shared_matrices)
    return value.item(), [gradient * WEIGHT * INTERVAL for gradient in gradients]


def relative_error(actual, expected) -> float:
    error = sum((a - e).double().square().sum().item() for a, e in zip(actual, expected, strict=True))
    return math.sqrt(error / sum(e.double().square().sum().item() for e in expected))


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_is_that_of_exact_double_backward(tmp_path, tokenizer, dtype):
    """One token a row has no sign to guess. transformers' norms are float32."""
    ones = defaultdict(lambda: (1,))

    def inspect(trainer, batches):
        return trainer._structural.drawn and exact(trainer, batches, ones)

    steps = run(tmp_path, tokenizer, high=1, dtype=dtype, inspect=inspect)
    assert all(gradient is None for gradient in steps.gradients[0])  # it is not due
    value, expected = steps.inspected[1]
    assert relative_error(steps.gradients[1], expected) < 1e-5
    log = [log["loss/structural"] for log in steps.trainer.state.log_history if "loss/structural" in log]
    assert log == [0.0, pytest.approx(value, rel=1e-5)]


@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_gradient_in_bfloat16_is_near_the_exact_one(tmp_path, tokenizer, form):
    """Of the same model in float64; a central difference has an error above 1 there."""
    ones = defaultdict(lambda: (1,))

    def inspect(trainer, batches):
        if trainer._structural.drawn is None:
            return None
        model = copy.deepcopy(trainer.model).double().eval()  # without checkpoints
        scored = ScoredModel(model)
        shared = [layer.alter_A["default"].weight for layer in scored.layers_of("default")]
        wide = SimpleNamespace(
            scored=scored, gating=scored.gating, shared_matrices=shared, alter_config=trainer.alter_config,
            _structural=trainer._structural,
        )  # fmt: skip
        return exact(wide, batches, ones)[1]

    dtype = torch.bfloat16 if form == "weights" else torch.float32
    steps = run(tmp_path, tokenizer, high=1, dtype=dtype, inspect=inspect, bf16=form == "autocast")
    assert steps.trainer.structural_weight == WEIGHT and steps.trainer._structural.exact
    assert relative_error(steps.gradients[1], steps.inspected[1]) < 0.2  # it was .11 and less


def test_accumulated_batches_add_up_to_the_gradient_of_one(tmp_path, tokenizer):
    whole = run(tmp_path, tokenizer, high=3)
    parts = run(tmp_path, tokenizer, high=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert len(parts.batches) == 2 * len(whole.batches) == 4
    assert relative_error(parts.gradients[1], whole.gradients[1]) < 1e-6


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_both_ways_to_the_gradient_agree_in_every_family(family):
    """Double backward would miss, silently, what an operation of its own declares to be constant."""
    # grouped matrix products are for float32 at most
    wide = torch.float32 if family == "qwen3_moe" else torch.float64
    model = adapted(family).to(wide)
    scored = ScoredModel(model)
    shared = [layer.alter_A["default"] for layer in scored.layers_of("default")]
    row = {"input_ids": IDS[2:], "attention_mask": MASK[2:], "entropy": torch.full((1, IDS.shape[1]), 2.0)}
    offsets = [torch.zeros(A.weight.shape, dtype=wide, requires_grad=True) for A in shared]
    given = scored, "default", Q, row, torch.tensor([4, 7]), torch.tensor([1.0, -1.0]), offsets
    twice = exact_structural_invariance(SignedEntropy(*given, autocast=nullcontext), offsets)
    norm = math.sqrt(sum(A.weight.square().sum().item() for A in shared))
    step, tolerance = (1e-3, 0.05) if family == "qwen3_moe" else (1e-4, 1e-2)
    difference = structural_invariance(SignedEntropy(*given, autocast=None), offsets, step * max(1.0, norm))
    assert relative_error(difference.gradients, twice.gradients) < tolerance
    assert obstacle_to_second_derivative(SignedEntropy(*given, autocast=nullcontext), offsets) is None


def test_the_layers_below_leave_no_graph(tmp_path, tokenizer):
    """Also under gradient checkpointing, which has embeddings require gradients."""
    trainer = prepared(tmp_path, tokenizer, lambda i: 1, torch.float32, gradient_checkpointing=True)
    trainer.model.enable_input_require_grads()
    layers, seen = trainer.scored.stack.layers, []
    first = min(trainer.alter_config.layers_to_transform)
    assert first > trainer.alter_config.router_layer > 0
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    trainer._structural._obstacle()
    assert seen == [depth >= first for depth in range(len(layers))]


# ---- the draw -------------------------------------------------------------------------------------------------------


def batch_of(counts: dict[int, int]) -> dict[str, torch.Tensor]:
    """Rows with so many high-entropy tokens each."""
    high = torch.arange(5) < torch.tensor(list(counts.values())).unsqueeze(1)
    return {"row_id": torch.tensor(list(counts)), "high": high}


def test_a_row_is_drawn_as_often_as_it_has_tokens(tmp_path, tokenizer):
    term = make_trainer(tmp_path, tokenizer, adapter={})._structural  # due at every step
    batches = [batch_of({7: 1, 3: 0, 5: 3}), batch_of({4: 2, 7: 1})]  # row 7 twice
    found, others = Counter(), Counter()
    for step in range(2000):
        for order, counter in ((batches, found), (batches[::-1], others)):
            term.draw(order, lambda batch: type("Masks", (), {"high": batch["high"]}), step)
            counter[term.drawn] += 1
    assert found == others  # how the step is cut is nothing to it
    share = {drawn.row_id: count / 2000 for drawn, count in found.items()}
    assert share == pytest.approx({7: 2 / 7, 5: 3 / 7, 4: 2 / 7}, abs=0.03)
    assert {drawn.row_id: drawn.tokens for drawn in found} == {7: 2, 5: 3, 4: 2}


@pytest.mark.parametrize("tokens", [64, 1])
def test_the_estimate_is_unbiased(tmp_path, tokenizer, monkeypatch, tokens):
    """Its mean over draws is the mean of ||grad_A S_q||^2 over all high-entropy answer tokens of the step."""
    monkeypatch.setattr(structural, "TOKENS", tokens)
    trainer = prepared(tmp_path, tokenizer, lambda i: 1 + i % 3)
    trainer.train()
    data = trainer.train_dataset
    batch = trainer.data_collator([data[0, 0], data[1, 0], data[2, 1]])  # retain row 0 is there twice
    norms = []
    for row in range(6):
        for S in entropies(trainer, batch, row):
            grads = torch.autograd.grad(S, trainer.shared_matrices, retain_graph=True)
            norms.append(sum(g.square().sum().item() for g in grads))
    term, masks, values = trainer._structural, trainer._masks(batch), []
    for step in range(1, 240, 2):
        term.draw([batch], lambda batch: masks, step)
        values.append(term(batch, masks.high, step).item())
    values = torch.tensor(values)
    error = values.std() / len(values) ** 0.5
    expected = sum(norms) / len(norms)
    assert error < 0.15 * expected and abs(values.mean() - expected) < 2.5 * error


def test_signs_differ_from_row_to_row_and_from_step_to_step(tmp_path, tokenizer):
    """One choice of eps explains the gradient; the other does not."""
    choices = [(1, 1), (1, -1)]

    def inspect(trainer, batches):
        drawn = trainer._structural.drawn
        if drawn is None:
            return None
        errors = [
            relative_error(
                [A.grad for A in trainer.shared_matrices], exact(trainer, batches, {drawn.row_id: chosen})[1]
            )
            for chosen in choices
        ]
        return drawn.row_id, errors

    steps = run(tmp_path, tokenizer, high=2, inspect=inspect, per_device_train_batch_size=1, max_steps=20)
    found = defaultdict(list)
    for row_id, errors in steps.inspected[1::2]:
        assert min(errors) < 1e-4 and max(errors) > 1e-2
        found[row_id].append(choices[errors.index(min(errors))])
    assert {signs for rows in found.values() for signs in rows} == set(choices)
    assert any(row_id >= 8 for row_id in found) and any(row_id < 8 for row_id in found)  # retain rows as well


# ---- where there is nothing to look at, or no way to do it ----------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Grows by one for each pass of the model that the term makes."""
    made: list[int] = []
    original = SignedEntropy.__call__
    monkeypatch.setattr(SignedEntropy, "__call__", lambda self: (made.append(1), original(self))[1])
    return made


def of_A(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value for name, value in state.items() if ".alter_A." in name]


def test_a_step_without_such_a_token_costs_no_pass_and_leaves_A_alone(tmp_path, tokenizer, counted):
    """Momentum and weight decay included."""
    trainer = prepared(
        tmp_path, tokenizer, lambda i: int(i < 1), optim="adamw_torch", weight_decay=0.1,
        per_device_train_batch_size=1, max_steps=16,
    )  # fmt: skip
    seen = []

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((trainer._structural.drawn, len(counted), of_A(adapter_state(trainer))))

    trainer.add_callback(After())
    counted.clear()
    start = of_A(adapter_state(trainer))
    trainer.train()
    for (_, before, A), (drawn, after, B) in zip([(None, 0, start), *seen], seen, strict=False):
        assert after - before == (drawn is not None)
        assert all(torch.equal(a, b) for a, b in zip(A, B, strict=True)) == (drawn is None)
    assert {drawn is None for drawn, _, _ in seen[1::2]} == {True, False}


def test_data_without_such_a_token_are_said_and_A_rests(tmp_path, tokenizer, counted, caplog, monkeypatch):
    adapter = {"entropy_quantile": None, "entropy_threshold": 1.85}
    trainer = make_trainer(tmp_path, tokenizer, adapter=adapter, max_steps=2)
    assert trainer.structural_weight > 0
    counted.clear()
    before = adapter_state(trainer)
    with caplog.at_level(logging.INFO, "alter_peft"):
        trainer.train()
    said = [
        record.getMessage() for record in caplog.records if "L_struct has nothing to look at" in record.getMessage()
    ]
    assert len(said) == 1 and "threshold of 1.85" in said[0]
    assert trainer.structural_weight == 0 and not counted and trainer._structural.args.structural_weight > 0
    assert all(torch.equal(a, b) for a, b in zip(of_A(before), of_A(adapter_state(trainer)), strict=True))


class _Opaque(torch.autograd.Function):
    """The identity, by a kernel that has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.clone()


class _Kernel(_Opaque):
    """The same, by one of which torch takes the gradient for a constant, without a word."""

    @staticmethod
    def backward(ctx, grad):
        return grad.detach().clone()


class OpaqueActivation(nn.Module):
    def __init__(self, kernel=_Opaque):
        super().__init__()
        self.kernel = kernel

    def forward(self, x):
        return self.kernel.apply(nn.functional.silu(x))


def opaque_attention(module, query, key, value, *args, **kwargs):
    output, weights = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    return _Opaque.apply(output), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_by_a_kernel_is_replaced_while_the_term_is_computed(tmp_path, tokenizer, dtype):
    AttentionInterface.register("opaque", opaque_attention)
    AttentionMaskInterface.register("opaque", sdpa_mask)
    model = make_llama(len(tokenizer), attn_implementation="opaque").to(dtype)
    trainer = make_trainer(tmp_path, tokenizer, model=model, adapter={}, max_steps=2)
    before = of_A(adapter_state(trainer))
    trainer.train()
    assert trainer._structural.exact and trainer.structural_weight > 0
    assert model.config._attn_implementation == "opaque"
    assert any(not torch.equal(a, b) for a, b in zip(before, of_A(adapter_state(trainer)), strict=True))


def opaque_model(tokenizer, dtype, kernel=_Opaque) -> Any:
    model = make_llama(len(tokenizer)).to(dtype)
    for layer in model.model.layers:
        layer.mlp.act_fn = OpaqueActivation(kernel)
    return model


@pytest.mark.parametrize(("kernel", "bf16"), [(_Opaque, False), (_Kernel, True)])
def test_what_has_no_second_derivative_has_a_central_difference(tmp_path, tokenizer, caplog, kernel, bf16):
    """In float32, also where the training runs under bfloat16 autocast."""
    with caplog.at_level(logging.INFO, "alter_peft"):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model=opaque_model(tokenizer, torch.float32, kernel),
            adapter={},
            max_steps=2,
            bf16=bf16,
        )
        trainer.prepare()
    assert any(
        "central difference: the model cannot be differentiated twice" in r.getMessage() for r in caplog.records
    )
    assert trainer.structural_weight > 0 and not trainer._structural.exact
    gradients = []
    steps = Steps(lambda trainer, batches: gradients.append([A.grad.clone() for A in trainer.shared_matrices]))
    steps.attach(trainer)
    trainer.train()
    other = make_trainer(tmp_path, tokenizer, adapter={}, max_steps=2, bf16=bf16)
    again = Steps(lambda trainer, batches: gradients.append([A.grad.clone() for A in trainer.shared_matrices]))
    again.attach(other)
    other.train()
    # the second step's: in the first B is 0
    assert relative_error(gradients[1], gradients[3]) < (0.1 if bf16 else 1e-2)


def test_and_is_left_out_in_half_precision(tmp_path, tokenizer, caplog):
    """In which the central difference is noise."""
    trainer = make_trainer(
        tmp_path, tokenizer, model=opaque_model(tokenizer, torch.bfloat16), adapter={}, max_steps=2,
        structural_weight=0.1,
    )  # fmt: skip
    trainer.prepare()
    assert any(
        "L_struct is left out" in r.getMessage() and "noise in torch.bfloat16" in r.getMessage()
        for r in caplog.records
    )
    assert trainer.structural_weight == 0 and not any(A.requires_grad for A in trainer.shared_matrices)
    assert trainer.args.structural_weight == 0.1  # the user's, who may give them to another trainer
    trainer.create_model_card()
    assert "| `structural_weight` | 0.0 |" in (tmp_path / "README.md").read_text()
    before = adapter_state(trainer)
    trainer.train()
    after = adapter_state(trainer)
    assert all(torch.equal(before[name], after[name]) for name in after if ".alter_A." in name)
    assert any(not torch.equal(before[name], after[name]) for name in after if ".alter_B." in name)


def test_retained_rows_are_looked_at_though_no_step_passes_them(tmp_path, tokenizer, counted):
    """`retain_weight=0`: the tokens of Eq. 8 are those of both sets."""
    trainer = prepared(
        tmp_path, tokenizer, lambda i: 1, retain_weight=0.0, per_device_train_batch_size=1, max_steps=12
    )
    drawn = []

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            drawn.append(trainer._structural.drawn)

    trainer.add_callback(After())
    trainer.train()
    ids = {row.row_id for row in drawn if row is not None}
    assert any(i < len(forget_rows()) for i in ids) and any(i >= len(forget_rows()) for i in ids)
