"""GPT-J: attention and MLP side by side behind one norm, neighbouring dimensions turned, a bias on the head."""

from collections.abc import Mapping
from typing import Any

from jprune.models.config import DecoderConfig
from jprune.models.families import shared
from jprune.models.families.table import Family
from jprune.models.rope import Rope

MODEL = {
    "embed/embedding": ("transformer.wte.weight", "vocab d_model"),
    "final_norm/scale": ("transformer.ln_f.weight", "d_model"),
    "final_norm/bias": ("transformer.ln_f.bias", "d_model"),
    "head/kernel": ("lm_head.weight", "vocab d_model"),
    "head/bias": ("lm_head.bias", "vocab"),
}
BLOCK = {
    "attn_norm/scale": ("transformer.h.{i}.ln_1.weight", "d_model"),
    "attn_norm/bias": ("transformer.h.{i}.ln_1.bias", "d_model"),
    "attn/q/kernel": ("transformer.h.{i}.attn.q_proj.weight", "(heads head_dim) d_model"),
    "attn/k/kernel": ("transformer.h.{i}.attn.k_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/v/kernel": ("transformer.h.{i}.attn.v_proj.weight", "(kv_heads head_dim) d_model"),
    "attn/o/kernel": ("transformer.h.{i}.attn.out_proj.weight", "d_model (heads head_dim)"),
    "mlp/up/kernel": ("transformer.h.{i}.mlp.fc_in.weight", "d_ff d_model"),
    "mlp/up/bias": ("transformer.h.{i}.mlp.fc_in.bias", "d_ff"),
    "mlp/down/kernel": ("transformer.h.{i}.mlp.fc_out.weight", "d_model d_ff"),
    "mlp/down/bias": ("transformer.h.{i}.mlp.fc_out.bias", "d_model"),
}


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    return shared.config(
        architecture,
        hf,
        rope=Rope(dims=hf["rotary_dim"], interleaved=True),
        norm="layer",
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        gated=False,
        mlp_bias=True,
        head_bias=True,
    )


FAMILY = Family(
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    defaults={
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_inner": None,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    config=_config,
    model=MODEL,
    block=BLOCK,
    variants=({"rotary_dim": 4}, {"rotary_dim": 8, "n_inner": 24}),
)
