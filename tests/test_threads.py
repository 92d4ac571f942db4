# SPDX-License-Identifier: Apache-2.0
"""Threads that share a gated model: each has its own gates, and the answers are those of one after another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapters import ROUTER_IDS, ROUTERS, VOCAB, adapt, generated, llama
from conftest import make_llama
from trainer_setup import make_trainer


PROMPTS = [
    torch.randint(4, VOCAB, (1 + row % 2, 5 + row), generator=torch.Generator().manual_seed(row)) for row in range(8)
]


@pytest.fixture(autouse=True)
def interleaved():
    """Threads change places as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def answer(model, prompt: torch.Tensor, **options) -> torch.Tensor:
    return generated(model, input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **options)


def together(*calls: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What the calls return that four threads make at the same time."""
    barrier = threading.Barrier(4)

    def begin() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    with ThreadPoolExecutor(4, initializer=begin) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize(
    "router", [*ROUTERS, {"router": "entropy"}, {"router": "static"}], ids=[*ROUTER_IDS, "entropy", "static"]
)
def test_four_threads_generate_as_one_after_another(router):
    model = llama(8.0, **router)
    alone = [answer(model, prompt) for prompt in PROMPTS]
    found = together(*[lambda prompt=prompt: answer(model, prompt) for prompt in PROMPTS])
    assert all(map(torch.equal, found, alone))


def test_contexts_and_adapter_names_hold_in_their_own_thread():
    model = llama(8.0)
    model.add_adapter("other", model.peft_config["default"])
    prompt = PROMPTS[1]

    def rescaled() -> torch.Tensor:
        with model.experts(forget_0=-2.0, forget_1=-2.0):
            return answer(model, prompt)

    calls = [
        lambda: answer(model, prompt),
        rescaled,
        lambda: answer(model, prompt, adapter_names=["other", "__base__"]),
        lambda: answer(model, PROMPTS[3], num_beams=3),
    ] * 3
    alone = [call() for call in calls]
    assert len({tuple(output.flatten().tolist()) for output in alone}) == 4  # so that a mix-up shows
    assert all(map(torch.equal, together(*calls), alone))


def test_saved_modules_of_rows_hold_in_their_own_thread():
    model = adapt(make_llama(VOCAB), 8.0, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.neg_()
    prompt = PROMPTS[1]
    calls = [lambda: answer(model, prompt), lambda: answer(model, prompt, adapter_names=["default", "__base__"])] * 4
    alone = [call() for call in calls]
    assert not torch.equal(alone[0], alone[1])
    assert all(map(torch.equal, together(*calls), alone))


def test_a_thread_that_is_started_within_a_context_is_not_in_it():
    model, prompt = llama(8.0), PROMPTS[1]
    plain = answer(model, prompt)
    with model.experts(forget_0=-2.0, forget_1=-2.0), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(answer, model, prompt).result(), plain)
        assert not torch.equal(answer(model, prompt), plain)


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("router", [{}, {"router": "static"}], ids=["context", "static"])
def test_recomputed_layers_see_the_gates_in_whatever_thread_they_are_recomputed(tmp_path, tokenizer, router):
    """On a GPU autograd has a thread of its own, in which checkpoints are recomputed."""

    def gradients(**options) -> dict[str, torch.Tensor]:
        adapter = {"init_weights": False, **router}
        trainer = make_trainer(tmp_path, tokenizer, adapter=adapter, structural_weight=0.0, **options)
        trainer.prepare()
        if options:
            trainer.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        inputs = next(iter(trainer.get_train_dataloader()))
        loss = trainer.hidden_states(trainer.model, inputs).square().sum()
        with trainer.gating.supply(learns_experts=False):  # another pass meanwhile, as that of L_struct
            pass
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        return {name: p.grad for name, p in trainer.model.named_parameters() if ".alter_B." in name}

    found, expected = gradients(gradient_checkpointing=True), gradients()
    assert sum(grad is not None for grad in expected.values()) > 0
    torch.testing.assert_close(found, expected)
