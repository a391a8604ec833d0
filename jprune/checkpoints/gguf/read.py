"""GGUF files (llama.cpp's format) presented as a Hugging Face checkpoint: its tensor names, layouts and config.

Quantised tensors are dequantised to float32 when they are read; F32, F16 and BF16 stay as they are. For the
architecture "llama" (Llama, Mistral, SmolLM2, ...) llama.cpp stores the rows of q and k in the order of its interleaved
rotary embedding: rows (2j, 2j+1) of a head are Hugging Face's rows (j, j + head_dim/2). We put them back. Families that
are not laid out like Llama are in `families`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jprune.annotations import Shaped
from jprune.checkpoints.gguf import families as gguf_families
from jprune.checkpoints.gguf import header as gguf_header
from jprune.checkpoints.gguf.tensors import PLAIN, read_tensor
from jprune.checkpoints.source import Source, StoredTensor, identify
from jprune.errors import JpruneError

# GGUF's name of the architecture -> Hugging Face's class and model_type.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K")
_ROPE_FACTORS = "rope_freqs.weight"  # not a weight: the frequency divisors of Llama 3's rope scaling


def open_source(path: Path) -> Source:
    """Opens a GGUF file; its tensors carry Hugging Face names and layouts.

    Raises:
        JpruneError: the file is damaged, or its architecture or a tensor's type is not supported.
    """
    header = gguf_header.read(path)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise JpruneError(
            f"{path}: one of {header.metadata['split.count']} parts of a split GGUF; join them first with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    config = hugging_face_config(header)
    if (arch := header.metadata["general.architecture"]) in gguf_families.LAYOUTS:
        tensors = {
            key: _put_back(_stored(header, tensor, {}), undo)
            for key, (tensor, undo) in gguf_families.tensors(header, arch, config).items()
        }
        return _source(path, header, config, tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if config["model_type"] != "llama":
        heads = {}
    tensors = {
        _hugging_face_name(t.name): _stored(header, t, heads)
        for t in header.tensors.values()
        if t.name != _ROPE_FACTORS
    }
    return _source(path, header, config, tensors)


def _source(path: Path, header: gguf_header.Header, config: dict, tensors: dict[str, StoredTensor]) -> Source:
    return Source(
        config=config,
        tensors=tensors,
        layout="hugging_face",
        side_files=functools.partial(_side_files, header),
        identity=functools.partial(identify, path),
    )


def _put_back(stored: StoredTensor, undo: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
    """A tensor without what llama.cpp's converter did to it."""
    shape = undo(np.broadcast_to(np.float32(0), stored.shape)).shape
    return dataclasses.replace(stored, shape=shape, read=lambda: undo(stored.read()))


def hugging_face_config(header: gguf_header.Header) -> dict:
    """The config.json that the model's metadata describe.

    Raises:
        JpruneError: unsupported architecture, a key that must be there is missing, or rope scaling we cannot express.
    """
    metadata, path = header.metadata, header.path
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES and arch not in gguf_families.LAYOUTS:
        supported = ", ".join((*_ARCHITECTURES, *gguf_families.LAYOUTS))
        raise JpruneError(f"{path}: GGUF architecture {arch!r} is not supported; supported: {supported}")

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"is {value!r}, expected one number"
            raise JpruneError(
                f"{path}: the GGUF metadata {arch}.{key} {found}; the file is incomplete or not supported"
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999974e-06

    if number("expert_count", 0) > 0 and not (arch in gguf_families.LAYOUTS and gguf_families.LAYOUTS[arch].experts):
        raise JpruneError(f"{path}: mixture-of-experts models are not supported in GGUF files of architecture {arch!r}")
    if arch in gguf_families.LAYOUTS:
        return gguf_families.hugging_face_config(header, arch, _vocab_size(header), number)
    width, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", width // max(heads, 1))
    if (rotary := number("rope.dimension_count", head_dim)) != head_dim:
        raise JpruneError(f"{path}: rotary embedding over {rotary} of {head_dim} dimensions is not supported")
    architecture, model_type = _ARCHITECTURES[arch]
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": _vocab_size(header),
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, arch, head_dim, number),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    return config


def _vocab_size(header: gguf_header.Header) -> int:
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise JpruneError(
            f"{header.path}: tensor token_embd.weight is missing; the file is incomplete or not a language model"
        )
    return embedding.shape[0]


def _rope_scaling(header: gguf_header.Header, arch: str, head_dim: int, number: Callable) -> dict | None:
    metadata, path = header.metadata, header.path
    if _ROPE_FACTORS in header.tensors:
        stored = header.tensors[_ROPE_FACTORS]
        return _llama3_scaling(path, read_tensor(header, stored), number("rope.freq_base", 10000.0), head_dim)
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = number("rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = number("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise JpruneError(f"{path}: rope scaling {kind!r} is not supported; supported: none, linear, yarn, llama3")


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict:
    """Llama 3's scaling out of the frequency divisors that the converter computed from it.

    The divisors are 1 for short wavelengths, `factor` for long ones, and in between a blend that depends on three more
    numbers. All published Llama 3 models use 1, 4 and 8192 for those; we recompute the divisors and refuse others.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise JpruneError(f"{path}: {_ROPE_FACTORS} does not hold Llama 3's rope scaling, the only one supported there")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _hugging_face_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight for blk.3.attn_q.weight; names we do not know stay as they are."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        block, part, kind = match.groups()
        if part in _BLOCK_NAMES:
            return f"model.layers.{block}.{_BLOCK_NAMES[part]}.{kind}"
    elif match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        part, kind = match.groups()
        return f"{_MODEL_NAMES.get(part, part)}.{kind}"
    return name


def _stored(header: gguf_header.Header, tensor: gguf_header.Tensor, heads: dict[str, int]) -> StoredTensor:
    from gguf.constants import GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.type).name
    if kind not in PLAIN and kind not in _QUANTISED:
        supported = ", ".join((*PLAIN, *_QUANTISED))
        raise JpruneError(
            f"{header.path}: tensor {tensor.name!r} is stored as {kind}, which is not supported; supported: "
            f"{supported}. Use another quantisation of the same model"
        )
    part = tensor.name.split(".")[-2] if tensor.name.startswith("blk.") else ""
    count = heads.get(part)
    if count is not None and (count < 1 or tensor.shape[0] % (2 * count)):
        raise JpruneError(
            f"{header.path}: {tensor.shape[0]} rows of {tensor.name!r} are not {count} heads of an even size"
        )

    def read() -> np.ndarray:
        values = read_tensor(header, tensor)
        return values if count is None else undo_rotary_permutation(values, count)

    return StoredTensor(
        shape=tensor.shape,
        dtype=PLAIN.get(kind, np.dtype(np.float32)),
        where=header.path.name,
        read=read,
        stored_bytes=tensor.nbytes,
    )


def undo_rotary_permutation(rows: Shaped[np.ndarray, "rows ..."], heads: int) -> Shaped[np.ndarray, "rows ..."]:
    """Rows of q or k in Hugging Face's order, from llama.cpp's: within each head, evens first, then odds."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _side_files(header: gguf_header.Header) -> dict[str, bytes]:
    from jprune.checkpoints.gguf.tokenizer import tokenizer_files

    files = tokenizer_files(header)
    ids = {name: header.metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    if "tokenizer.ggml.padding_token_id" in header.metadata:
        ids["pad_token_id"] = header.metadata["tokenizer.ggml.padding_token_id"]
    files["generation_config.json"] = json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2).encode()
    return files
