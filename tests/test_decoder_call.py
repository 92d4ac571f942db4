# SPDX-License-Identifier: Apache-2.0
"""What the gates of a token depend on, in every way in which a decoder is told of padding, of a cache and of texts."""

from __future__ import annotations

import pytest
import torch
from adapters import (
    IDS,
    MASK,
    ROUTER_IDS,
    ROUTERS,
    VOCAB,
    adapt,
    context_of,
    generated,
    llama,
    logits,
    sharpened,
)
from conftest import make_llama
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
)

from alter_peft.tuner.decoder_call import DecoderCall


ENTROPY = {"router": "entropy"}
gated = pytest.mark.parametrize("router", [*ROUTERS, ENTROPY], ids=[*ROUTER_IDS, "entropy"])


# ---- packed rows ----------------------------------------------------------------------------------------------------


TEXTS = [
    torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 1, 150, 9)
]


def flattened(**options) -> dict:
    rows = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in TEXTS]
    collate = DataCollatorWithFlattening(return_tensors="pt", separator_id=-100, **options)
    return dict(collate(rows))


@gated
@pytest.mark.parametrize(
    "named", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["positions", "all"]
)
def test_packed_texts_are_gated_as_if_alone(router, named):
    model = llama(8.0, **router)
    found = logits(model, **flattened(**named), use_cache=False).split([len(text) for text in TEXTS], dim=1)
    for text, packed in zip(TEXTS, found, strict=True):
        alone = logits(model, input_ids=text[None], use_cache=False)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-3)


# the name that every transformers 5 knows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_texts_train_as_if_alone(checkpointing):
    def gradients(batches: list[dict]) -> torch.Tensor:
        model = llama(8.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        total = sum((~batch["labels"][:, 1:].eq(-100)).sum() for batch in batches)
        for batch in batches:
            loss = model(**batch, use_cache=False, num_items_in_batch=total).loss
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = [{"input_ids": text[None], "labels": text[None]} for text in TEXTS if len(text) > 1]
    packed = gradients([flattened()])
    torch.testing.assert_close(packed, gradients(alone), rtol=1e-3, atol=1e-3)
    assert packed.abs().max() > 0.1


def test_packed_rows_without_positions_raise():
    lengths = torch.tensor([0, 6, 12], dtype=torch.int32)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_sequence_mask"):
        with pytest.raises(ValueError, match=rf"packed rows \(`{name}`.*`position_ids` that restart.*router='static'"):
            logits(llama(), input_ids=IDS[:1], **{name: lengths})


def test_positions_beside_a_mask_begin_no_text():
    """As `generate` gives them: padding has some position, and after a hole in the mask they go on."""
    model, mask = llama(8.0), MASK.clone()
    mask[1, 5:7] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    inputs = {"input_ids": IDS, "attention_mask": mask}
    logits(model, **inputs)
    expected = context_of(model).state.gates["default"]
    logits(model, **inputs, position_ids=positions)
    torch.testing.assert_close(context_of(model).state.gates["default"], expected, rtol=1e-3, atol=1e-4)
    assert context_of(model).tokens.text is None


def test_the_text_of_each_position():
    call = DecoderCall(make_llama(VOCAB).model, masks_are_made=False)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [3, 4, 5, 6, 7, 8, 9, 0]])
    expected = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1]])
    ids = torch.zeros(2, 8, dtype=torch.long)
    of_three = torch.stack([positions, *[torch.zeros_like(positions)] * 3])  # Qwen2-VL's
    for given in (positions, of_three):
        assert torch.equal(call.tokens({"input_ids": ids, "position_ids": given}).text, expected)
    assert call.tokens({"input_ids": ids, "position_ids": of_three[1:]}).text is None


# ---- static caches --------------------------------------------------------------------------------------------------


@gated
@pytest.mark.parametrize("future", [0, 1])
@pytest.mark.parametrize("pieces", [[12], [5, 7]], ids=["whole", "pieces"])
def test_a_mask_of_the_whole_static_cache(router, future, pieces):
    """A loop of one's own, which makes the mask once."""
    model = llama(8.0, **router)
    cache = StaticCache(config=model.config, max_cache_len=40)
    mask = torch.cat([MASK, torch.full((3, 28), future)], dim=1)
    tokens, parts = IDS, IDS.split(pieces, dim=1)
    with torch.no_grad():
        for _ in range(12):
            for part in parts:
                out = model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            parts = [out[:, -1:].argmax(dim=-1)]
            tokens = torch.cat([tokens, *parts], dim=1)
            mask[:, tokens.shape[1] - 1] = 1
    assert torch.equal(tokens, generated(model))


@pytest.mark.parametrize("width", [12, 40], ids=["so far", "whole"])
def test_a_mask_of_the_cache_is_read_where_the_pass_stands(width):
    """In a dynamic cache too, whose later columns nothing attends to."""
    model = llama(8.0)
    cache = DynamicCache(config=model.get_base_model().config)
    mask = torch.cat([MASK, torch.zeros(3, 28, dtype=torch.long)], dim=1)[:, :width]
    logits(model)
    expected = context_of(model).state.gates["default"]
    found = []
    for part in IDS.split([5, 1, 6], dim=1):
        seen = cache.get_seq_length() + part.shape[1]
        logits(model, input_ids=part, attention_mask=mask[:, : max(seen, width - 28)], past_key_values=cache)
        found.append(context_of(model).state.gates["default"])
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


# ---- the states of state-space models -------------------------------------------------------------------------------


MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3, "pad_token_id": 0}
STATE_SPACE = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**MAMBA, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)),
}


@gated
@pytest.mark.parametrize("family", STATE_SPACE)
def test_a_state_space_model_with_and_without_its_states(family, router):
    torch.manual_seed(0)
    model = adapt(sharpened(STATE_SPACE[family]()), 8.0, **router)
    row = {"input_ids": IDS[2:]}
    whole = logits(model, **row, use_cache=False)
    gates = context_of(model).state.gates["default"]
    assert router == ENTROPY or len(set(gates.argmax(-1).flatten().tolist())) > 1
    with torch.no_grad():
        first = model(input_ids=IDS[2:, :8], use_cache=True)
        found = [first.logits]
        for part in IDS[2:, 8:].split(1, dim=1):
            found.append(model(input_ids=part, cache_params=first.cache_params, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        generated(model, **row, attention_mask=None), generated(model, **row, attention_mask=None, use_cache=False)
    )
    beams = {"num_beams": 3, "attention_mask": None}
    assert torch.equal(generated(model, **row, **beams), generated(model, **row, **beams, use_cache=False))


# ---- batch neighbours and the cache ---------------------------------------------------------------------------------


@gated
def test_no_neighbour_and_no_cache_changes_an_answer(router):
    """In float32: docs/peft_features.md has the shares in 16 bits."""
    model = llama(8.0, **router)
    lengths = [5, 9, 14, 6]
    rows = [
        torch.randint(4, VOCAB, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths
    ]
    width = max(lengths)
    ids = torch.cat([torch.cat([torch.zeros(1, width - row.shape[1]).long(), row], dim=1) for row in rows])
    mask = (ids > 0).long()
    beside = generated(model, input_ids=ids, attention_mask=mask)[:, width:]
    for use_cache in (True, False):
        for row, found in zip(rows, beside, strict=True):
            alone = generated(model, input_ids=row, attention_mask=torch.ones_like(row), use_cache=use_cache)
            assert torch.equal(alone[0, row.shape[1] :], found)
