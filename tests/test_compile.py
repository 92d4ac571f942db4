# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from adapters import IDS, MASK, VOCAB, adapt, context_of, generated
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def strict():
    """Every recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def small(**arguments):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, pad_token_id=0, eos_token_id=1))
    base.lm_head.weight.data.mul_(30)
    return adapt(base, 8.0, **arguments)


def batches(count: int = 3):
    for seed in range(count):
        ids = torch.randint(4, VOCAB, (3, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[seed, : 1 + seed] = 0
        yield ids, mask


@pytest.mark.parametrize(
    "arguments", [{}, {"inference_entropy": "base"}, {"router": "static"}], ids=["context", "context-base", "static"]
)
def test_forward_is_one_graph(arguments):
    model, counter = small(**arguments), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for ids, mask in batches():
            found = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    assert counter.frame_count == 1


def test_one_graph_serves_every_length():
    model, counter = small().double(), CompileCounter()  # a graph adds up all experts, in another order
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (150, 260, 400):  # beyond one chunk of the moving average
            ids = torch.randint(4, VOCAB, (2, length))
            found = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits)
    assert counter.frame_count == 1


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_step_is_one_graph(checkpointing):
    model = small().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.get_base_model().disable_input_require_grads()  # PEFT's hook, which no compiled model can have
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps = []
    for student, called in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for seed, (ids, mask) in enumerate(batches()):
            entropy = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed)) * 2
            with context_of(student).supply(entropy=entropy, owner=torch.eye(3).roll(seed, 0)):
                loss = called(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        steps.append(torch.stack(losses))
    torch.testing.assert_close(*steps)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.parametrize("arguments", [{}, {"inference_entropy": "base"}], ids=["context", "context-base"])
def test_compiled_decoding_is_one_graph(arguments):
    model = small(**arguments)
    expected = generated(model)
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    counters.clear()
    assert torch.equal(generated(model, cache_implementation="static", compile_config=settings), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_inductor():
    model = small()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        expected = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # fused kernels sum in another order
