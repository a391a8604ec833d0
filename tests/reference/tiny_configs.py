"""Tiny models of every causal language model of transformers: sizes by the names that their configs have for them."""

import dataclasses

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The classes of all causal language models, by model_type."""
VOCAB = 64
SIZES = {
    **dict.fromkeys(("vocab_size", "n_words", "text_vocab_size", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "dim_model", "embedding_size"), 32),
    **dict.fromkeys(
        ("embed_dim", "word_embed_proj_dim", "hidden_dim", "d_embed", "lru_width", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 64),
    **dict.fromkeys(("d_inner", "dff", "d_ff", "feed_forward_size", "ffn_hidden_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "mlp_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_heads", "num_ssm_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads", "swa_num_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("dim_head", "kv_channels", "attention_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "moe_layer_freq"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "indexer_compress_ratio"), 4),
    **dict.fromkeys(("indexer_head_dim",), 8),
    "indexer_kv_heads": 1,
    "indexer_budget": 64,
    "hidden_size_global": 32,
    "index_topk": 64,  # all tokens: among scores that are equal, as zeros are, others are chosen by JAX
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length", "max_length"), 64),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCAB),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
}
"""What each name is set to where a config has it."""
WORDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "add_cross_attention": False,
    "use_cache": False,
    "router_jitter_noise": 0.0,
    "causal": True,
}
MIXED = ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern", "attn_layer_period")
SPECIAL: dict[str, dict] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": None},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_qk_rope_head_dim", "swa_v_head_dim"), 8),
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_query_groups": 4,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "nemotron_h": {"n_groups": 2},
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "roc_bert": {
        "enable_shape": False,
        "enable_pronunciation": False,
        "shape_embed_dim": 8,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 16,
    },
}
"""What else a kind of model needs, by its model_type."""


def config(kind):
    """A tiny config of a model_type."""
    return _config(transformers.CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def _config(cls, special):
    names = {field.name for field in dataclasses.fields(cls)} | set(getattr(cls, "attribute_map", {}))
    own = {name: value for name, value in (SIZES | WORDS).items() if name in names}
    mapped = getattr(cls, "attribute_map", {})
    own = {name: value for name, value in own.items() if mapped.get(name) not in own}
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        if not hasattr(sub, "__dataclass_fields__"):
            sub = type(getattr(cls(), name, None))
        if hasattr(sub, "__dataclass_fields__"):
            own[name] = _config(sub, special.get(name, {})).to_dict()
    if "qk_nope_head_dim" in names and "num_key_value_heads" in own:
        own["num_key_value_heads"] = own["num_attention_heads"]
    if any(name in names for name in MIXED):
        own |= {name: 4 for name in ("num_hidden_layers", "n_layers", "num_layers") if name in own}
    return cls(**(own | {k: v for k, v in special.items() if not isinstance(v, dict) or k not in own}))


def _check(made):
    count = sum(p.numel() for p in made.parameters())
    if count > 100_000_000:
        big = max(made.named_parameters(), key=lambda item: item[1].numel())
        raise ValueError(f"not small: {count} parameters, the largest {big[0]} {tuple(big[1].shape)}")


def model(kind, seed=0):
    """A tiny model with all weights random."""
    made = config(kind)
    with torch.device("meta"):
        _check(transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32))
    torch.manual_seed(seed)
    own = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif not parameter.any():  # kernels that begin as zeros, as those of xLSTM's gates
                parameter.normal_(0, 0.05)
    own.tie_weights()
    return own
