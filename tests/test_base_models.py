# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapters import (
    IDS,
    MASK,
    ROUTER_IDS,
    ROUTERS,
    SIZES,
    VOCAB,
    adapt,
    config,
    context_of,
    generated,
    llama,
    logits,
    sharpened,
)
from conftest import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from trainer_setup import forget_rows, retain_rows
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
)

from alter_peft import AlterConfig, AlterUnlearnTrainer, UnlearnTrainer
from alter_peft.tuner.export import export_to_lora
from alter_peft.tuner.layer import AlterLinear
from alter_peft.tuner.token_router import AlterRouter


routers = pytest.mark.parametrize("router", ROUTERS, ids=ROUTER_IDS)
STATIC = {"router": "static", "expert_weights": [0.5, -1.0]}
IMAGE_TOKEN = VOCAB - 1
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}  # 4 patches


def opt():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=128, pad_token_id=0))


FAMILIES = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, sliding_window=5, use_sliding_window=True, max_window_layers=2)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=5, sliding_window_pattern=2)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "opt": opt,
}


def build(make):
    torch.manual_seed(0)
    return sharpened(make())


# Decoders: windows, hybrids, mixtures of experts, OPT's flat inputs


@routers
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_and_without_a_cache_beyond_the_window(family, router):
    base = build(FAMILIES[family])
    expected = logits(base)
    model = adapt(base, 8.0, **router)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(generated(model), generated(model, use_cache=False))
    gates = context_of(model).state.gates["default"]
    assert len(set(gates.argmax(-1).flatten().tolist())) > 1


def test_flat_inputs_are_gated_and_owned_by_their_rows():
    model = llama(temperature_low=5.0).train()
    layer = next(module for module in model.modules() if isinstance(module, AlterLinear))
    with context_of(model).supply(owner=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])):
        logits(model)
        layer.flattens = True  # as OPT's do
        x, found = torch.randn(3, 12, layer.in_features), []
        for shaped in (x, x.flatten(0, 1)):
            model.zero_grad()
            output = layer(shaped)
            output.square().sum().backward()
            gradients = [parameter.grad for parameter in layer.alter_B["default"].parameters()]
            found.append([output.flatten(0, -2), *gradients])
        torch.testing.assert_close(*found)
        layer.flattens = False  # as with experts that are given some of the tokens each
        with pytest.raises(ValueError, match=r"input of shape \(36,\) .*exclude_modules"):
            layer(x.flatten(0, 1))


def test_inputs_embeds_instead_of_ids():
    model = llama()
    embeds = model.get_input_embeddings()(IDS).detach()
    assert torch.equal(logits(model, inputs_embeds=embeds, attention_mask=MASK), logits(model))
    found = generated(model, input_ids=None, inputs_embeds=embeds)
    assert torch.equal(found, generated(model)[:, 12:])


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("router", [*ROUTERS, STATIC], ids=[*ROUTER_IDS, "static"])
def test_half_precision(dtype, router):
    base = make_llama(VOCAB).to(dtype)
    expected = logits(base)
    fresh = adapt(base, init_weights=True, **router)
    assert logits(fresh).dtype == dtype and torch.equal(logits(fresh), expected)
    assert {p.dtype for name, p in fresh.named_parameters() if ".alter_" in name} == {torch.float32}

    model = adapt(make_llama(VOCAB).to(dtype), **router)
    changed = logits(model)
    assert not torch.allclose(changed, expected, atol=0.1)
    if model.peft_config["default"].is_gated:
        whole, cache, pieces = context_of(model).state.gates["default"], DynamicCache(config=model.config), []
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            inputs = {"input_ids": IDS[:, start:stop], "attention_mask": MASK[:, :stop]}
            logits(model, **inputs, past_key_values=cache, use_cache=True)
            pieces.append(context_of(model).state.gates["default"])
        assert whole.dtype == pieces[0].dtype == torch.float32
        # tokens themselves may differ by the rounding of the base, with an adapter or without
        assert torch.equal(torch.cat(pieces, 1).argmax(-1)[MASK.bool()], whole.argmax(-1)[MASK.bool()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_router_stays_in_float32_beside_a_half_precision_adapter(dtype):
    torch.manual_seed(1)
    model = get_peft_model(make_llama(VOCAB).to(dtype), config(), autocast_adapter_dtype=False).eval()
    kinds = {name.split(".alter_")[1][0]: p.dtype for name, p in model.named_parameters() if ".alter_" in name}
    assert kinds == {"A": dtype, "B": dtype, "r": torch.float32}
    assert logits(model).dtype == dtype and logits(model).isfinite().all()
    assert context_of(model).state.gates["default"].dtype == torch.float32


# Embeddings, meta


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # for the head
@routers
def test_tied_embeddings(tmp_path, router):
    base = make_llama(VOCAB, tie_word_embeddings=True)
    expected = logits(base)
    model = adapt(base, **router)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not torch.allclose(logits(model), expected)
    assert torch.equal(generated(model), generated(model, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(VOCAB, tie_word_embeddings=True), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="contains the LM head"):
        adapt(make_llama(VOCAB, tie_word_embeddings=True), target_modules=["lm_head"], **router)


def test_base_on_meta_has_its_adapter_there_as_with_lora():
    for settings in (config(), LoraConfig(target_modules="all-linear")):
        with torch.device("meta"):
            base = make_llama(VOCAB)
        model = get_peft_model(base, settings)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# Encoder-decoder, vision-language


def t5():
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def test_encoder_decoder_with_the_static_router():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    expected = logits(t5(), **inputs)
    assert torch.equal(
        logits(adapt(t5(), task_type="SEQ_2_SEQ_LM", router="static", init_weights=True), **inputs), expected
    )
    model = adapt(t5(), task_type="SEQ_2_SEQ_LM", **STATIC)
    changed = logits(model, **inputs)
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert torch.equal(generated(model), generated(model, use_cache=False))
    torch.testing.assert_close(logits(model.merge_and_unload(), **inputs), changed, atol=1e-4, rtol=1e-3)


def test_encoder_decoder_with_a_gated_router_raises():
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration has an encoder.*router='static'"):
        adapt(t5(), task_type="SEQ_2_SEQ_LM")


VISION_LANGUAGE = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**SIZES), image_token_index=IMAGE_TOKEN,
        )
    ),
    "gemma3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(**VISION), text_config=Gemma3TextConfig(**SIZES, sliding_window=5),
            image_token_index=IMAGE_TOKEN, mm_tokens_per_image=4,
        )
    ),
}  # fmt: skip


@routers
@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_text_decoder_of_a_vision_language_model(family, router):
    # without a hidden layer, which magnifies rounding where it is random
    model = adapt(build(VISION_LANGUAGE[family]), 8.0, router_hidden_size=0, **router)
    adapted = [name for name, module in model.named_modules() if isinstance(module, AlterLinear)]
    assert adapted and all(".language_model.layers." in name for name in adapted)
    ids = IDS.clamp(max=IMAGE_TOKEN - 1)
    ids[:, 5:9] = IMAGE_TOKEN
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": MASK, "pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    with model.disable_adapter():
        base = logits(model, **inputs)
    changed = logits(model, **inputs)
    assert not torch.allclose(changed, base, atol=1e-2)
    alone = {name: value[2:] for name, value in inputs.items()}  # the row without padding
    torch.testing.assert_close(logits(model, **alone), changed[2:], atol=2e-4, rtol=1e-4)
    shorter = {**{name: value[:1, 4:] for name, value in inputs.items()}, "pixel_values": inputs["pixel_values"][:1]}
    torch.testing.assert_close(logits(model, **shorter), changed[:1, 4:], atol=2e-4, rtol=1e-4)  # without its padding
    options = {**inputs, "suppress_tokens": [IMAGE_TOKEN]}  # which has no image, where a random model says it
    expected = generated(model, **options)
    assert torch.equal(generated(model, use_cache=False, **options), expected)
    assert torch.equal(generated(model, cache_implementation="static", **options), expected)


# Quantised bases


def quantized(folder, kind, seed=0, vocab_size=VOCAB):
    """A tiny Llama, quantised by transformers while it is loaded; skips where the package isn't installed."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        settings = BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
    torch.manual_seed(seed)
    # bitsandbytes wants whole blocks of 64 in 4 bits
    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    tiny = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    sharpened(tiny).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=settings, device_map="cpu").eval()


kinds = pytest.mark.parametrize("kind", ["torchao", "8bit", "4bit"])


@kinds
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantized_base(tmp_path, kind):
    base = quantized(tmp_path, kind)
    expected = logits(base)
    fresh = adapt(base, init_weights=True)
    assert all(layer.quantization_backend is not None for layer in fresh.modules() if isinstance(layer, AlterLinear))
    assert torch.equal(logits(fresh), expected)
    base = fresh.unload()
    assert torch.equal(logits(base), expected)

    gated = adapt(base)
    changed = logits(gated)
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert torch.equal(generated(gated), generated(gated, use_cache=False))
    with pytest.raises(ValueError, match="gates every token by itself"):
        gated.merge_adapter()
    gated.train()
    gated(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    learns = {name for name, p in gated.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns and all(".alter_" in name for name in learns)
    gated.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(gated.unload(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), changed)


@kinds
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_merging_into_a_quantized_base(tmp_path, kind):
    base = quantized(tmp_path, kind)
    original = logits(base)
    model = adapt(base, **STATIC)
    expected = logits(model)
    effect = (expected - original).abs().mean()
    assert effect > 0.5
    export_to_lora(model, tmp_path / "lora")
    model = adapt(quantized(tmp_path, kind), **STATIC)  # 4 bits are merged before the first forward pass
    model.merge_adapter()
    found = logits(model)
    assert (found - expected).abs().mean() < 0.5 * effect  # the sum is quantised again
    lora = PeftModel.from_pretrained(quantized(tmp_path, kind), tmp_path / "lora").eval()
    assert (logits(lora.merge_and_unload()) - found).abs().mean() < 0.05 * effect
    if kind != "4bit":
        model.unmerge_adapter()
        assert (logits(model) - expected).abs().mean() < 0.5 * effect
    merged = adapt(quantized(tmp_path, kind), **STATIC).merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, AlterLinear) for module in merged.modules())
    assert torch.equal(logits(merged), found)


@kinds
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(AlterConfig(r=4), id="alter"),
        pytest.param(LoraConfig(target_modules=["q_proj"]), id="lora", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_training_on_a_quantized_base(tmp_path, tokenizer, monkeypatch, kind, adapter):
    """From a checkpoint on, too, which another base of the same kind is not gone on from."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    trainers = {"ALTER": AlterUnlearnTrainer, "LORA": UnlearnTrainer}

    def made(base, **options):
        cls: Any = trainers[adapter.peft_type]
        options = {"bf16": False, "report_to": "none", "use_cpu": True, "save_steps": 1, "as_chat": False, **options}
        args = cls.config_class(output_dir=str(tmp_path / "out"), forget_loss="ga", **options)
        forget = forget_rows(4).remove_columns("domain")
        given = {"train_dataset": forget, "retain_dataset": retain_rows(4), "processing_class": tokenizer}
        return cls(base, args, peft_config=copy.deepcopy(adapter), **given)

    size = len(tokenizer)
    made(quantized(tmp_path, kind, vocab_size=size), max_steps=1).train()
    trainer = made(quantized(tmp_path, kind, vocab_size=size), max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    base = quantized(tmp_path, kind, seed=1, vocab_size=size)
    with pytest.raises(ValueError, match=r"`model` is '.*', but .* other weights of this name"):
        made(base, max_steps=3).train(resume_from_checkpoint=True)


def test_four_bits_that_a_cpu_has_packed_are_not_merged():
    """bitsandbytes packs them in the first forward pass where the CPU knows bfloat16, and then misreads them."""
    model = llama(**STATIC)
    layer = next(module for module in model.modules() if isinstance(module, AlterLinear))
    layer.get_base_layer().weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match=r"packed for this CPU .* Merge before any forward pass"):
        layer.merge()


class Packed(nn.Module):
    """Stands for a GPTQ or AWQ layer: packed integers in place of a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
        self.register_buffer("unpacked", linear.weight.detach())

    def forward(self, x):
        return x @ self.unpacked.T


def packed_llama():
    base = make_llama(VOCAB)
    for layer in base.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    return base


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # the stand-in
def test_layers_that_peft_knows_as_gptq(monkeypatch):
    def resolve(layer, **kwargs):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Packed) else None

    monkeypatch.setattr("alter_peft.tuner.targets.resolve_quantization_backend", resolve)
    monkeypatch.setattr("alter_peft.tuner.layer.resolve_quantization_backend", resolve)
    expected = logits(make_llama(VOCAB))
    torch.testing.assert_close(
        logits(adapt(packed_llama(), target_modules=["down_proj"], init_weights=True)), expected
    )
    model = adapt(packed_llama(), target_modules=["down_proj"], **STATIC)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    layers = [layer for layer in model.modules() if isinstance(layer, AlterLinear)]
    assert {layer.get_base_layer().qweight.dtype for layer in layers} == {torch.int32}
    with pytest.raises(TypeError, match="gptq"):
        model.merge_adapter()


def test_a_residual_stream_of_other_dimensions_names_the_way_out():
    """As Gemma 3n's, which has several streams."""
    model = get_peft_model(make_llama(64), AlterConfig())
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output.unsqueeze(0))
    with pytest.raises(ValueError, match=r"of shape \(batch, length, width\), but this model's is \(1, 2, 5, 32\)"):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))


def test_unknown_layer_names_module_type_and_way_out():
    with pytest.raises(ValueError, match=r"'model.layers.\d.mlp.down_proj' is a Packed.*install the package"):
        adapt(packed_llama(), target_modules=["down_proj"])


def test_cache_made_without_a_config_grows_its_own_layers_first():
    model = llama()
    cache = DynamicCache()
    logits(model, input_ids=IDS, attention_mask=MASK, past_key_values=cache, use_cache=True)
    assert len(cache.layers) == 5  # those of the model, then the router's
    assert len([module for module in model.modules() if isinstance(module, AlterRouter)]) == 1


# Bases on two devices


@pytest.mark.parametrize("first", [1, 2, 3])  # the router's layer is the second, the adapted ones are the last two
def test_gates_go_where_the_layers_are(first):
    """The second device is simulated by meta; accelerate's hooks move inputs, as under `device_map`."""

    def spread(model):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        for module in (*base.model.layers[first:], base.model.norm, base.lm_head):
            add_hook_to_module(module, AlignDevicesHook("meta", place_submodules=True, skip_keys="past_key_values"))
        return model

    model, whole = spread(llama(8.0)), llama(8.0)
    loaded = adapt(spread(make_llama(VOCAB)), 8.0)  # spread before it was adapted
    assert logits(model).device.type == logits(loaded).device.type == "meta"
    caches = [DynamicCache(), DynamicCache()]
    for part in IDS[2:].split([8, 1, 3], dim=1):
        for each, cache in zip((model, whole), caches, strict=True):
            logits(each, input_ids=part, past_key_values=cache, use_cache=True)
        found, expected = (context_of(each).state.gates["default"] for each in (model, whole))
        assert found.shape == expected.shape and (first < 2) == (found.device.type == "meta")
        assert found.device.type == "meta" or torch.equal(found, expected)
    owner = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    with context_of(model).supply(owner=owner, entropy=torch.ones(3, 12)):
        assert model.train()(input_ids=IDS, attention_mask=MASK).logits.requires_grad
