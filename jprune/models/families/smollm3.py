"""SmolLM3: Llama's shape, with every fourth layer left without rotary embedding, and windows where asked for."""

from collections.abc import Mapping
from typing import Any

from jprune.errors import JpruneError
from jprune.models.config import DecoderConfig
from jprune.models.families import llama, shared
from jprune.models.families.table import Family


def _config(architecture: str, hf: Mapping[str, Any]) -> DecoderConfig:
    layers = range(hf["num_hidden_layers"])
    turned = hf["no_rope_layers"]  # 1 where queries and keys are turned, whatever the name says
    if turned is None:
        turned = [(i + 1) % hf["no_rope_layer_interval"] for i in layers]
    rope, bias = shared.rope(hf), bool(hf["attention_bias"])
    kinds = hf["layer_types"] or ["full_attention" if turned[i] else "sliding_attention" for i in layers]
    if not hf["use_sliding_window"] and hf["layer_types"] and "sliding_attention" in kinds and hf["sliding_window"]:
        raise JpruneError(
            "config.json: layer_types names layers with a sliding window, but use_sliding_window is false; "
            "set one or the other"
        )
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return shared.config(
        architecture,
        hf,
        rope=rope,
        ropes=tuple(rope if turned[i] else None for i in layers),
        windows=shared.windows({**hf, "sliding_window": window, "layer_types": kinds}),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf["mlp_bias"]),
    )


FAMILY = Family(
    architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    defaults={
        **llama.FAMILY.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "tie_word_embeddings": True,
    },
    config=_config,
    model=llama.MODEL,
    block=llama.BLOCK,
    variants=(
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
        {
            "no_rope_layer_interval": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 5,
            "mlp_bias": True,
        },
    ),
)
