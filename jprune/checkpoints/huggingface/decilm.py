"""DeciLM's config.json (NVIDIA's Nemotron-NAS models), the one form of per-layer sizes that vLLM reads.

`block_configs[i].attention.n_heads_in_group` says how many query heads share a key/value head, and
`block_configs[i].ffn.intermediate_size` (or, in NVIDIA's own models, `ffn_mult`) how wide the feed-forward part is.
Query heads and the hidden size are the same in every layer. Tensors are named as in Llama. vLLM reads the blocks as
objects, which its loader gets from the folder's own configuration class: `configuration_decilm.py`, put beside the
weights, and run with `--trust-remote-code`. jprune reads the same config.json without running anything.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.config import DecoderConfig, LayerSizes

ARCHITECTURE = "DeciLMForCausalLM"
_EXPRESSIBLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_CLASS_FILE = "configuration_decilm.py"
_OWN_KEYS = ("block_configs", "auto_map", "qkv_bias", "architectures", "model_type")
_KEYS = (  # that DeciLM shares with Llama
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
)


def stated(hf_config: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The config.json of the same model as a DeciLM.

    Raises:
        JpruneError: DeciLM cannot express it; says in which layer and why.
    """
    _check(config)
    known = families.explicit(hf_config)
    return (
        {key: known[key] for key in _KEYS if key in known}
        | _rope(known)
        | {
            "architectures": [ARCHITECTURE],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": f"{_CLASS_FILE.removesuffix('.py')}.DeciLMConfig"},
            "head_dim": config.head_dim,
            "intermediate_size": config.d_ff,
            "num_key_value_heads": config.kv_heads,
            "attention_bias": config.o_bias,
            "qkv_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
            "block_configs": [_block(config.layer(i)) for i in range(config.layers)],
        }
    )


def files() -> dict[str, bytes]:
    """What must lie beside the weights: the configuration class."""
    return {_CLASS_FILE: (Path(__file__).parent / _CLASS_FILE).read_bytes()}


def plain(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a DeciLM as that of a Llama or Qwen2 with per-layer sizes; any other as it is.

    Raises:
        JpruneError: a DeciLM with layers that have no attention or no feed-forward part, or that is of another kind.
    """
    names = hf_config.get("architectures")
    if not isinstance(names, list) or ARCHITECTURE not in names:
        return hf_config
    blocks, heads = hf_config.get("block_configs"), hf_config.get("num_attention_heads")
    if not isinstance(blocks, list) or len(blocks) != hf_config.get("num_hidden_layers") or not isinstance(heads, int):
        raise JpruneError(
            f"config.json: a {ARCHITECTURE} needs num_attention_heads and, in block_configs, one object for each of "
            "num_hidden_layers (older models of this name, without block_configs, are not supported)"
        )
    if hf_config.get("position_embedding_type", "rope") != "rope":
        raise JpruneError(
            f"config.json: position_embedding_type {hf_config['position_embedding_type']!r} is not supported"
        )
    try:
        sizes = [_sizes(i, block, heads, hf_config["hidden_size"]) for i, block in enumerate(blocks)]
    except (KeyError, TypeError) as error:
        raise JpruneError(f"config.json: block_configs is not what vLLM's DeciLM has ({error!r})") from error
    # Sizes of the whole model may be null: the blocks have their own.
    rest = {key: value for key, value in hf_config.items() if key not in _OWN_KEYS and value is not None}
    if hf_config.get("qkv_bias") and not hf_config.get("attention_bias"):
        rest = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | rest
    else:
        rest = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | rest
    width = hf_config["hidden_size"]
    head_dim = hf_config.get("head_dim") or width // heads
    return families.resized(rest, d_model=width, head_dim=head_dim, layers=range(len(sizes)), sizes=sizes)


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings under the keys of transformers 4 and 5 alike: DeciLM's class translates neither."""
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = given.pop("type", None) or "default"
    kind = given.pop("rope_type", None) or kind
    theta = given.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
    scaling = {"rope_type": kind, **given}
    keys = {"rope_theta": theta, "rope_parameters": scaling | {"rope_theta": theta}}
    return keys if kind == "default" else keys | {"rope_scaling": scaling}


def _check(config: DecoderConfig) -> None:
    def refused(why: str) -> JpruneError:
        return JpruneError(
            f"format decilm cannot hold this {config.architecture}: {why}. Write `format` jprune, which jprune loads"
        )

    if config.architecture not in _EXPRESSIBLE:
        raise refused(f"DeciLM computes as Llama does, and of other architectures only {', '.join(_EXPRESSIBLE)} do")
    if config.activation != "silu":
        raise refused(f"vLLM computes DeciLM with silu, not with {config.activation}")
    for i, window in enumerate(config.windows):
        if window is not None and window < config.context:
            raise refused(f"layer {i} has a sliding window of {window} tokens, and DeciLM has none")
    for i in range(config.layers):
        if (heads := config.layer(i).heads) != config.layer(0).heads:
            raise refused(
                f"layer {i} has {heads} query heads and layer 0 has {config.layer(0).heads}, but in DeciLM only "
                "feed-forward widths and the number of key/value heads may differ between layers"
            )


def _block(sizes: LayerSizes) -> dict[str, Any]:
    present = {"no_op": False, "replace_with_linear": False}
    return {
        "attention": {"n_heads_in_group": sizes.heads // sizes.kv_heads} | present,
        "ffn": {"intermediate_size": sizes.d_ff} | present,
    }


def _sizes(index: int, block: Mapping[str, Any], heads: int, width: int) -> LayerSizes:
    for part in ("attention", "ffn"):
        for kind in ("no_op", "replace_with_linear"):
            if block[part].get(kind):
                raise JpruneError(f"config.json: layer {index} has {kind} for its {part} part, which is not supported")
    group = block["attention"]["n_heads_in_group"]
    if heads % group:
        raise JpruneError(f"config.json: layer {index} has groups of {group} query heads, but there are {heads}")
    d_ff = block["ffn"].get("intermediate_size")
    if d_ff is None:  # two thirds of mult * hidden_size, up to the next multiple of 256
        d_ff = -(-int(2 * block["ffn"]["ffn_mult"] * width / 3) // 256) * 256
    return LayerSizes(heads, heads // group, d_ff)
