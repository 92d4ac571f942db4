# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
from adapters import IDS, MASK, ROUTER_IDS, ROUTERS, SIZES, VOCAB, adapt, config, generated, llama, logits, sharpened
from conftest import make_llama
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    set_seed,
)

from alter_peft.tuner.cache import StaticRouterStateLayer


routers = pytest.mark.parametrize("router", ROUTERS, ids=ROUTER_IDS)
MAKERS = {
    "full": lambda: make_llama(VOCAB),
    "sliding": lambda: sharpened(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))),
    "hybrid": lambda: sharpened(Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5))),
}


# Static cache


@routers
@pytest.mark.parametrize("family", MAKERS)
def test_static_cache_gives_the_same_tokens(family, router):
    torch.manual_seed(0)
    model = adapt(MAKERS[family](), 8.0, **router)
    expected = generated(model)
    assert torch.equal(generated(model, cache_implementation="static"), expected)
    assert torch.equal(generated(model, cache_implementation="static", prefill_chunk_size=5), expected)
    with model.disable_adapter():
        assert not torch.equal(generated(model), expected)


def test_static_cache_without_padding_and_with_eager_attention():
    model = llama(8.0)
    ones = torch.ones_like(IDS)
    assert torch.equal(
        generated(model, attention_mask=ones, cache_implementation="static"), generated(model, attention_mask=ones)
    )
    model.set_attn_implementation("eager")  # its masks are floats
    assert torch.equal(generated(model, cache_implementation="static"), generated(model))


@routers
def test_static_cache_is_static_and_can_be_reset(router):
    model = llama(8.0, **router)
    cache = StaticCache(config=model.config, max_cache_len=40)
    expected = generated(model)
    assert torch.equal(generated(model, past_key_values=cache), expected)
    states = [layer for layer in cache.layers if isinstance(layer, StaticRouterStateLayer)]
    assert [state.keys.shape for state in states] == [(3, 1, 1, 32)] and cache.is_compileable
    address = states[0].keys.data_ptr()
    cache.reset()
    assert torch.equal(generated(model, past_key_values=cache), expected)
    assert states[0].keys.data_ptr() == address and cache.layers.count(states[0]) == 1


def test_static_cache_and_beams():
    model = llama(8.0)
    assert torch.equal(generated(model, num_beams=3, cache_implementation="static"), generated(model, num_beams=3))


def test_offloaded_cache_raises():
    cache = DynamicCache()
    cache.offloading = True  # as `DynamicCache(offloading=True)`, which wants an accelerator
    with pytest.raises(ValueError, match="cannot use an offloaded `past_key_values`"):
        logits(llama(), input_ids=IDS, past_key_values=cache, use_cache=True)


# Assisted decoding


@routers
@pytest.mark.parametrize("adapted_assistant", [False, True], ids=["base-assists", "adapted-assists"])
def test_assisted_decoding_gives_the_same_tokens(router, adapted_assistant):
    adapted, base = llama(1.5, **router), make_llama(VOCAB)
    model, assistant = (base, adapted) if adapted_assistant else (adapted, base)
    row = {"input_ids": IDS[2:], "attention_mask": MASK[2:]}
    assert torch.equal(generated(model, assistant_model=assistant, **row), generated(model, **row))
    assert not torch.equal(generated(base, **row), generated(adapted, **row))  # so that tokens are rejected


def test_prompt_lookup_beyond_a_sliding_window():
    torch.manual_seed(0)
    model = adapt(MAKERS["sliding"](), 8.0)
    row = {"input_ids": IDS[2:, :5].repeat(1, 3), "attention_mask": torch.ones(1, 15, dtype=torch.long)}
    assert torch.equal(generated(model, prompt_lookup_num_tokens=3, **row), generated(model, **row))


@routers
@pytest.mark.parametrize("layers", [1, 2, 3])  # the router's layer is the third
def test_early_exit_gives_the_same_tokens(router, layers):
    model = llama(8.0, **router)
    row = {"input_ids": IDS[2:], "attention_mask": MASK[2:]}
    expected = generated(model, **row)
    assert torch.equal(generated(model, assistant_early_exit=layers, **row), expected)
    assert model.config.num_hidden_layers == 4 and torch.equal(generated(model, **row), expected)


# The router's state in a dynamic cache


def passes(model, cache, *parts):
    with torch.no_grad():
        return [model(input_ids=part, past_key_values=cache).logits for part in parts]


def test_only_the_last_positions_of_the_moving_average_are_kept(monkeypatch):
    monkeypatch.setattr("alter_peft.tuner.cache.KEPT", 4)
    model = llama(8.0)
    cache = DynamicCache(config=model.get_base_model().config)
    ids = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    found = torch.cat(passes(model, cache, ids[:, :7], ids[:, 7:8], ids[:, 8:]), dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    state = cache.layers[-1]
    assert state.get_seq_length() == 12 and state.keys.shape[-2] == 4
    cache.crop(-2)
    again = passes(model, cache, ids[:, 10:])[0]
    torch.testing.assert_close(again, expected[:, 10:], rtol=1e-4, atol=1e-4)
    for part in (state.keys, state.values):  # and not what they were cut from
        assert state.get_seq_length() == 12 and part.untyped_storage().nbytes() == part.numel() * part.element_size()


@pytest.mark.parametrize("kept", [4, 5])
def test_a_cache_cropped_too_deep_raises_at_the_next_pass(monkeypatch, kept):
    """Not while it is cropped: all its layers must have the same length, whatever is done with them then."""
    monkeypatch.setattr("alter_peft.tuner.cache.KEPT", kept)
    model = llama(8.0)
    cache = DynamicCache(config=model.get_base_model().config)
    ids = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = passes(model, cache, ids)[0]
    cache.crop(-kept)
    assert {layer.get_seq_length() for layer in cache.layers} == {12 - kept}
    cache.crop(-1)
    whole = copy.deepcopy(cache)
    whole.crop(-(12 - kept - 1))
    assert {layer.get_seq_length() for layer in whole.layers} == {0}
    torch.testing.assert_close(passes(model, whole, ids)[0], expected)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"cropped deeper than the last {kept} positions.*Start from an empty"):
            passes(model, cache, ids[:, :3])


def test_a_cache_cropped_too_deep_can_be_reset(monkeypatch):
    monkeypatch.setattr("alter_peft.tuner.cache.KEPT", 4)
    model = llama(8.0)
    cache = DynamicCache(config=model.get_base_model().config)
    expected = passes(model, cache, IDS[2:])[0]
    cache.crop(-5)
    cache.reset()
    torch.testing.assert_close(passes(model, cache, IDS[2:])[0], expected)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_an_adapter_that_was_off_for_a_part_of_the_cache_raises(make, is_static):
    model = adapt(make(), 8.0)
    of = {"config": model.get_base_model().config}
    cache = StaticCache(**of, max_cache_len=40) if is_static else DynamicCache(**of)
    ids = IDS[2:, :4]
    passes(model, cache, ids)
    with model.disable_adapter():
        passes(model, cache, ids)
    with pytest.raises(
        ValueError, match=r"holds 8 tokens, but .* 'default' has seen 4 of them.*cropped or .*disabled"
    ):
        passes(model, cache, ids)


# Other ways to generate


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "options", [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_sequences_of_one_prompt_with_and_without_a_cache(make, options):
    model = adapt(make(), 8.0)
    found = []
    for use_cache in (True, False):
        set_seed(0)
        found.append(generated(model, use_cache=use_cache, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_cache_goes_on_in_the_next_turn(make):
    model, row = adapt(make(), 8.0), {"input_ids": IDS[2:], "attention_mask": MASK[2:]}
    turn = generated(model, **row, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, IDS[2:, :5]], dim=1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(model, **both, past_key_values=turn.past_key_values), generated(model, **both))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_rows_of_a_cache_are_chosen_and_repeated(make):
    model = adapt(make(), 8.0)
    chosen, repeated = (DynamicCache(config=model.get_base_model().config) for _ in range(2))
    for cache in (chosen, repeated):
        passes(model, cache, IDS)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    repeated.batch_repeat_interleave(2)
    for cache, rows in ((chosen, [2, 0]), (repeated, [0, 0, 1, 1, 2, 2])):
        found = passes(model, cache, IDS[rows, :2])[0]
        whole = logits(model, input_ids=torch.cat([IDS[rows], IDS[rows, :2]], dim=1), use_cache=False)
        torch.testing.assert_close(found, whole[:, -2:], rtol=1e-3, atol=1e-3)


# Continuous batching


PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
SMALL = {"num_blocks": 8, "max_batch_tokens": 32, "page_size": 16}


def batched(model):
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(**SMALL)
    return model.generate_batch(PROMPTS, generation_config=greedy, continuous_batching_config=settings)


def test_continuous_batching_with_the_static_router_gives_the_same_tokens():
    model = llama(router="static")
    for prompt, output in zip(PROMPTS, batched(model).values(), strict=True):
        alone = generated(model, input_ids=torch.tensor([prompt]), attention_mask=None, max_new_tokens=4)
        assert output.generated_tokens == alone[0, len(prompt) :].tolist()


def test_continuous_batching_with_a_gated_router_raises():
    model = llama()
    for start in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match=r"'default' gates each token .* packs many requests into one row"):
            start(PROMPTS)


def test_continuous_batching_fails_without_a_peft_model_too():
    model = make_llama(VOCAB)
    model.add_adapter(config())
    assert all("packed rows" in output.error for output in batched(model).values())


def test_packed_rows_raise():
    lengths = torch.tensor([0, 6, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed rows \(`cu_seq_lens_q`.*router='static'"):
        logits(llama(), input_ids=IDS[:1], cu_seq_lens_q=lengths)
