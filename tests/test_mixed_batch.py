# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows have different adapters: each row is what it would be with its own adapter alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny_models import MASK, TOKENS, adapted, add, base_model, generate, inputs, outputs
from transformers import GenerationConfig

from alter_peft.tuner.layer import AlterLayer
from alter_peft.tuner.mixed_batch import RowAdapters


ROWS = ["default", "__base__", "other"]
PAIRS = {
    "context": ({}, {}),
    "depths": ({"router_layer": 2}, {"router_layer": 1, "num_forget_experts": 3}),
    "base": ({"inference_entropy": "base"}, {"inference_entropy": "base", "router_layer": 2}),
    "base-and-none": ({"inference_entropy": "base"}, {}),
    "static": ({"router": "static"}, {"router": "static", "r": 4}),
    "context-and-static": ({}, {"router": "static"}),
}
pairs = pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)


def two(family: str, first: dict, second: dict) -> PeftModel:
    model = adapted(family, **first)
    add(model, "other", family, **second)
    return model.eval()


def by_row(model: PeftModel, run, rows: list[str] = ROWS) -> list[torch.Tensor]:
    """What each row's own adapter gives, run by itself."""
    found = []
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                found.append(run(model)[row])
        else:
            model.set_adapter(name)
            found.append(run(model)[row])
    model.set_adapter("default")
    return found


def check_outputs(model: PeftModel, family: str, rows: list[str] = ROWS) -> None:
    expected = torch.stack(by_row(model, lambda model: outputs(model, family), rows))
    found = outputs(model, family, adapter_names=rows)
    seen = MASK.bool() if found.dim() == 3 and found.shape[1] == MASK.shape[1] else slice(None)  # not the padding
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs(model, family), expected, atol=1e-3)
    base = outputs(base_model(family), family)
    assert all(not torch.allclose(row, base[i], atol=3e-4) for i, row in enumerate(found) if rows[i] != "__base__")


@pytest.mark.parametrize("family", ["mlp", "bert", "t5", "gpt2"])
def test_static_rows_equal_their_own_adapter(family):
    check_outputs(two(family, *PAIRS["static"]), family)


@pairs
def test_rows_equal_their_own_adapter(first, second):
    model = two("llama", first, second)
    check_outputs(model, "llama")
    check_outputs(model, "llama", ["other", "other", "default"])


@pairs
def test_generation_gives_each_row_its_own_text(first, second):
    model = two("llama", first, second)
    expected = torch.stack(by_row(model, generate))
    assert torch.equal(generate(model, adapter_names=ROWS), expected)
    assert torch.equal(generate(model, adapter_names=ROWS, use_cache=False), expected)
    assert not torch.equal(generate(model), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_beams_and_returned_sequences_follow_their_row(family):
    model = two(family, *PAIRS["static" if family == "t5" else "depths"])
    more = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    expected = torch.stack(by_row(model, lambda model: generate(model, **more).unflatten(0, (3, 2)))).flatten(0, 1)
    assert torch.equal(generate(model, adapter_names=ROWS, **more), expected)


def test_sampling_several_sequences_of_a_row():
    model = two("llama", *PAIRS["depths"])
    more = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}  # greedy, but expanded by rows
    expected = torch.stack(by_row(model, generate)).repeat_interleave(3, dim=0)
    assert torch.equal(generate(model, adapter_names=ROWS, **more), expected)
    given = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2)
    more = {"do_sample": True, "generation_config": given}
    assert torch.equal(generate(model, adapter_names=ROWS, **more), expected[[0, 1, 3, 4, 6, 7]])


@pytest.mark.parametrize(
    "saved",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": TOKENS}],
    ids=["modules_to_save", "trainable_token_indices"],
)
@pytest.mark.parametrize("mode", [{}, {"inference_entropy": "base"}], ids=["context", "base"])
def test_rows_have_their_own_saved_modules(saved, mode):
    model = two("llama", {**saved, **mode}, mode)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save.default." in name or "trainable_tokens_delta" in name:
                parameter.mul_(2.0)
    check_outputs(model, "llama")
    expected = torch.stack(by_row(model, generate))
    assert torch.equal(generate(model, adapter_names=ROWS), expected)


def test_no_adapter_in_any_row_is_the_base():
    model = two("llama", *PAIRS["context-and-static"])
    assert torch.equal(outputs(model, "llama", adapter_names=["__base__"] * 3), outputs(base_model("llama"), "llama"))


@pytest.mark.parametrize("first", [{}, {"router": "static"}], ids=["context", "static"])
def test_what_a_mixed_batch_refuses(first):
    model = adapted("llama", **first)
    before = outputs(model, "llama")
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        outputs(model, "llama", adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match=r"non-existing adapter.s.: no, nor"):
        outputs(model, "llama", adapter_names=["nor", "default", "no"])
    with pytest.raises(TypeError, match=r"`adapter_names` of type .*str.*, expected a list"):
        outputs(model, "llama", adapter_names="default")
    with pytest.raises(ValueError, match="`adapter_names` when the model is in training mode"):
        model.train()(**inputs("llama"), adapter_names=["default"] * 3)
    model.eval()
    context = next(module.context for module in model.modules() if isinstance(module, AlterLayer))
    assert context.mixed is None and torch.equal(outputs(model, "llama"), before)


def test_merged_adapters_refuse_a_mixed_batch():
    model = adapted("mlp", router="static")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter` first"):
        outputs(model, "mlp", adapter_names=["default"] * 3)


def test_rows_of_a_batch():
    rows = RowAdapters(("b", "__base__", "a", "b"), copies=2)
    assert rows.adapters == ["b", "a"]
    assert rows.groups(4) == {"b": [0, 3], "a": [2]}
    assert rows.groups(8) == {"b": [0, 1, 6, 7], "a": [4, 5]}
    for batch in (1, 3, 12):
        with pytest.raises(ValueError, match=f"got 4 and {batch} respectively"):
            rows.of(batch)
