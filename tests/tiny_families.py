# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every decoder family that transformers has: sizes by the names that configs give them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCAB = 384
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("embedding_dim", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), 32),
    "mamba_d_ssm": 64,
    "hidden_size_per_layer_input": 32,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "shared_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("feed_forward_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    "num_decoder_layers": 4,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "attention_heads", "linear_num_heads"), 4),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "d_head", "attention_head_size", "linear_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank", "hc_lowrank"), 8),
    **dict.fromkeys(("gated_norm_rank", "time_step_rank", "mamba_dt_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "o_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), 128),
    "max_target_positions": 128,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 6),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "decoder_start_token_id", "forced_eos_token_id"), 1),
    "pad_token_id": 0, "is_decoder": True, "causal": True,
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "activation_dropout", "hidden_dropout"), 0.0),
}  # fmt: skip


# What a family needs beside these sizes, or in their place; `None` leaves an argument at its default
MLA = {"num_key_value_heads": 4}  # DeepSeek's attention has as many keys as queries
HYBRID = ["linear_attention", "full_attention"] * 2
SHARED = ["linear_attention", "linear_attention", "hybrid"] * 2
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), MLA),
    "bailing_hybrid": {**MLA, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**MLA, "layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8,
        "ple_embed_dim": 32,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": SHARED},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": SHARED},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
UNSET = (
    "head_dim",
    "num_key_value_heads",
    "num_kv_heads",
    "n_shared_experts",
    "num_experts_per_tok",
)  # set where the default is None


PARTS = "of several kinds of input; its text decoder is a family of its own"
WHOLE = "of several kinds of input: `test_base_models.py` has LLaVA and Gemma 3"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("dots3_note", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), PARTS),
    **dict.fromkeys(("emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2"), WHOLE),
    **dict.fromkeys(("mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"), WHOLE),
    "blt": "bytes in patches, with tables of a fixed size",
    "dots3_note_text": "layers of a fixed size",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose states it reads"
    ),
}


def families() -> list[str]:
    """All model types that `AutoModelForCausalLM` knows and that are built here."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT]


def tiny_config(family: str) -> PreTrainedConfig:
    """Of one of `MODEL_FOR_CAUSAL_LM_MAPPING`'s model types."""
    config_class = CONFIG_MAPPING[family]
    known = config_class().to_dict()
    given = {
        name: value
        for name, value in SIZES.items()
        if known.get(name) is not None or (name in known and name in UNSET)
    }
    return config_class(**{**given, **OVERRIDES.get(family, {})})


def tiny_model(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = tiny_config(family)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
