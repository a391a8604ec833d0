"""GGUF files of families that are not laid out like Llama: their config.json, and every tensor put back as it was.

The names of tensors are those of the `gguf` package's own map, which is what llama.cpp's converter writes. What the
converter does to values is undone here:

    gemma, gemma2, gemma3   one is added to the scales of norms
    gpt2                    Conv1D kernels are transposed
    bloom, gptneox          q, k, v of each head side by side become all q, all k, all v
    falcon                  the same, where a key/value head lies behind its query heads
    qwen2moe, qwen3moe      the experts of a layer are one tensor
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jprune.checkpoints.gguf.header import Header, Tensor
from jprune.checkpoints.gguf.tensors import read_tensor
from jprune.errors import JpruneError
from jprune.models import families
from jprune.models.families import shared

Number = Callable[..., Any]
"""A number among the metadata of the architecture, by the rest of its key, with a default."""
Values = np.ndarray


class Layout(NamedTuple):
    """What a GGUF architecture is for Hugging Face."""

    architecture: str
    settings: Callable[[Header, Number], dict[str, Any]] = lambda header, number: {}  # beside sizes
    undo: Callable[[Mapping[str, Any], str, Values], Values] = lambda hf, key, values: values
    experts: bool = False
    """Whether its layers have some."""


def _gemma(hf: Mapping[str, Any], key: str, values: Values) -> Values:
    return values.astype(np.float32) - np.float32(1) if key.endswith("norm.weight") else values


def _gpt2(hf: Mapping[str, Any], key: str, values: Values) -> Values:
    return values.T if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else values


def _side_by_side(hf: Mapping[str, Any], key: str, values: Values) -> Values:
    if "query_key_value" not in key:
        return values
    parts = values.reshape(3, hf["num_attention_heads"], -1, *values.shape[1:])
    return parts.swapaxes(0, 1).reshape(values.shape)


def _falcon(hf: Mapping[str, Any], key: str, values: Values) -> Values:
    if "query_key_value" not in key:
        return values
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    each = values.reshape(heads + 2 * kv_heads, -1, *values.shape[1:])
    q = each[:heads].reshape(kv_heads, heads // kv_heads, *each.shape[1:])
    k, v = each[heads : heads + kv_heads, None], each[heads + kv_heads :, None]
    return np.concatenate([q.reshape(kv_heads, -1, *each.shape[1:]), k, v], axis=1).reshape(values.shape)


def _gemma2_settings(header: Header, number: Number) -> dict[str, Any]:
    # The scale of scores is not stored: llama.cpp knows the one model in which it does not follow from the head size.
    odd = number("block_count") == 46
    width, heads = number("embedding_length"), number("attention.head_count")
    return {
        "query_pre_attn_scalar": width // heads if odd else number("attention.key_length"),
        "sliding_window": number("attention.sliding_window", 4096),
        "attn_logit_softcapping": number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": number("final_logit_softcapping", 30.0),
    }


def _gemma3_settings(header: Header, number: Number) -> dict[str, Any]:
    odd = number("block_count") == 62
    width, heads = number("embedding_length"), number("attention.head_count")
    factor = number("rope.scaling.factor", 1.0)
    return {
        "query_pre_attn_scalar": width // heads if odd else number("attention.key_length"),
        "sliding_window": number("attention.sliding_window"),
        "rope_theta": number("rope.freq_base", 1_000_000.0),
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
    }


def _phi3_settings(header: Header, number: Number) -> dict[str, Any]:
    head_dim = number("embedding_length") // number("attention.head_count")
    settings = {
        "partial_rotary_factor": number("rope.dimension_count", head_dim) / head_dim,
        "sliding_window": number("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": number("rope.scaling.original_context_length", number("context_length")),
    }
    if (long := header.tensors.get("rope_factors_long.weight")) is not None:
        short = header.tensors["rope_factors_short.weight"]
        both = {"long_factor": long, "short_factor": short}
        factors = {name: read_tensor(header, tensor).astype(float).tolist() for name, tensor in both.items()}
        settings["rope_scaling"] = {"rope_type": "longrope", **factors}
    return settings


def _gptneox_settings(header: Header, number: Number) -> dict[str, Any]:
    head_dim = number("embedding_length") // number("attention.head_count")
    return {
        "rotary_pct": number("rope.dimension_count", head_dim) / head_dim,
        "rotary_emb_base": number("rope.freq_base", 10000.0),
        "use_parallel_residual": bool(header.metadata.get("gptneox.use_parallel_residual", True)),
        "attention_bias": "blk.0.attn_qkv.bias" in header.tensors,
    }


def _falcon_settings(header: Header, number: Number) -> dict[str, Any]:
    grouped = number("attention.head_count_kv", 1) > 1 or "blk.0.attn_norm_2.weight" in header.tensors
    return {
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in header.tensors else 1,
        "bias": "blk.0.attn_qkv.bias" in header.tensors,
    }


def _qwen2moe_settings(header: Header, number: Number) -> dict[str, Any]:
    # Whether weights are normalised is not stored: llama.cpp does so for Qwen3's and not for Qwen2's.
    return _experts(header, number) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": number("expert_shared_feed_forward_length"),
    }


def _qwen3moe_settings(header: Header, number: Number) -> dict[str, Any]:
    return _experts(header, number) | {"norm_topk_prob": True}


def _experts(header: Header, number: Number) -> dict[str, Any]:
    return {
        "num_experts": number("expert_count"),
        "num_experts_per_tok": number("expert_used_count"),
        "moe_intermediate_size": number("expert_feed_forward_length"),
        "rope_theta": number("rope.freq_base", 10000.0),
    }


LAYOUTS = {
    "gemma": Layout("GemmaForCausalLM", undo=_gemma),
    "gemma2": Layout("Gemma2ForCausalLM", _gemma2_settings, _gemma),
    "gemma3": Layout("Gemma3ForCausalLM", _gemma3_settings, _gemma),
    "gpt2": Layout("GPT2LMHeadModel", undo=_gpt2),
    "phi3": Layout("Phi3ForCausalLM", _phi3_settings),
    "bloom": Layout("BloomForCausalLM", undo=_side_by_side),
    "gptneox": Layout("GPTNeoXForCausalLM", _gptneox_settings, _side_by_side),
    "falcon": Layout("FalconForCausalLM", _falcon_settings, _falcon),
    "qwen2moe": Layout("Qwen2MoeForCausalLM", _qwen2moe_settings, experts=True),
    "qwen3moe": Layout("Qwen3MoeForCausalLM", _qwen3moe_settings, experts=True),
}
_NOT_WEIGHTS = ("rope_factors_long.weight", "rope_factors_short.weight")


def hugging_face_config(header: Header, arch: str, vocab: int, number: Number) -> dict[str, Any]:
    """The config.json that the metadata describe; arguments as `gguf.hugging_face_config` has them."""
    layout = LAYOUTS[arch]
    family = families.ARCHITECTURES[layout.architecture]
    heads = number("attention.head_count")
    common = {
        "vocab_size": vocab,
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if "head_dim" in family.defaults:
        common["head_dim"] = number("attention.key_length", common["hidden_size"] // heads)
    eps = next(key for key in shared.NORM_EPS if key in family.defaults)
    common[eps] = number(f"attention.layer_norm_{'rms_' if eps.startswith('rms') else ''}epsilon")
    if "rope_theta" in family.defaults or arch in ("gemma", "gemma2", "phi3", "falcon"):
        common["rope_theta"] = number("rope.freq_base", 10000.0)
    named = {family.names.get(key, key): value for key, value in common.items()}
    return {
        "architectures": [layout.architecture],
        "model_type": family.model_type,
        **named,
        **layout.settings(header, number),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def tensors(header: Header, arch: str, hf: Mapping[str, Any]) -> dict[str, tuple[Tensor, Callable[[Values], Values]]]:
    """By Hugging Face key: where a tensor lies in the file, and what puts its values back as they were.

    Tensors that are not the model's keep their names.
    """
    import gguf

    config = families.config(hf)
    family = families.ARCHITECTURES[config.architecture]
    which = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    name_map = gguf.get_tensor_name_map(which, config.layers)
    sizes = {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads}
    strange = {name: tensor for name, tensor in header.tensors.items() if name not in _NOT_WEIGHTS}
    found: dict[str, tuple[Tensor, Callable[[Values], Values]]] = {}
    for entry in families.table(config).values():
        for i, key in enumerate(entry.keys):
            together = re.sub(r"\.experts\.\d+\.", ".experts.", key)
            options = {"try_suffixes": (".weight", ".bias")}
            name = name_map.get_name(together, **options)
            name = name or name_map.get_name(together.removeprefix(family.prefix), **options)
            if name is None:
                raise JpruneError(f"{header.path}: the gguf package knows no name for {key!r} in architecture {arch!r}")
            if name in header.tensors:
                tensor = header.tensors[name]
                own = _row(header, tensor, i, len(entry.keys)) if together != key else tensor
                found[key] = own, functools.partial(LAYOUTS[arch].undo, sizes, key)
                strange.pop(name, None)
    return found | {name: (tensor, lambda values: values) for name, tensor in strange.items()}


def _row(header: Header, tensor: Tensor, i: int, count: int) -> Tensor:
    """One of the tensors that lie one after the other in a tensor: quantisation goes along the last axis."""
    if tensor.shape[0] != count:
        raise JpruneError(f"{header.path}: {tensor.name!r} has {tensor.shape[0]} experts, and the model {count}")
    each = tensor.nbytes // count
    return dataclasses.replace(tensor, shape=tensor.shape[1:], begin=tensor.begin + i * each, nbytes=each)
