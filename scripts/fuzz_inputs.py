"""Files for scripts/fuzz.py: small valid ones of every kind that jprune reads, and how they are damaged.

Damage is of two sorts: of the bytes, whatever they mean, and of the structure, after which the file can still be parsed
and says something else.
"""

import functools
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "hidden_act": "silu", "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
RECORD = {
    "format_version": 1, "method": "magnitude", "source": "model",
    "recipe": {"method": "magnitude", "pattern": {"sparsity": 0.5}, "keep_zeros": False, "skip": []},
    "sparsity": {"zeros": 10, "prunable_parameters": 20, "total_parameters": 40}, "kernels": [],
    "perplexity": None, "seconds": 1.0, "notices": [],
}  # fmt: skip
ROWS = [{"text": f"w{i} w{i + 1} w3 " * 6} for i in range(4)]
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, math.nan,
    math.inf, "", " ", "a", "0", "auto", "../up", "/etc/passwd", "\x00", "\ud800", "\ufeff", "é" * 50, "x" * 5000, [],
    {}, [[]], [None], {"": None}, [0] * 300, "LlamaForCausalLM",
]  # fmt: skip
"""What is put in the place of a value."""
WORDS = [b"\x00", b"\xff", b"\xff" * 8, b"{", b"}", b"[", b'"', b"\\", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe",
         b"null", b"NaN", b"-", b"1e999", b"\\ud800", struct.pack("<Q", 2**63), struct.pack("<Q", 2**40)]  # fmt: skip
"""What is put between bytes."""


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: flipped, overwritten, cut off, left out, doubled, put between."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice([1, 2, 4, 8, 64, 1000]), len(out) - at)
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case _:
                out[at:at] = rng.choice(WORDS)
    return bytes(out)


def damaged_tree(value: Any, rng: random.Random) -> Any:
    """One to three changes somewhere in nested objects and lists: values, keys, entries left out or doubled, depth."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _damaged_once(value, rng)
    return value


def _damaged_once(value: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list) and len(node[key]) < 500:
                walk(node[key])

    value = json.loads(json.dumps(value))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.02:
        return rng.choice(STRANGE)
    walk(value)
    node, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice([str(key).upper(), f"{key}_", "", "x", "../x"])] = node.pop(key)
        case 2 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            try:
                node[key] = rng.choice([node[key] * 2, -node[key], node[key] + 1, node[key] - 1, node[key] / 3])
            except OverflowError:
                node[key] = 0
        case 3:
            other, there = rng.choice(places)
            node[key] = json.loads(json.dumps(other[there])) if isinstance(other, dict) or there < len(other) else None
        case 4 if rng.random() < 0.1:
            deep: Any = 0
            for _ in range(400):
                deep = [deep]
            node[key] = deep
        case _:
            node[key] = rng.choice(STRANGE)
    return value


def as_json(value: Any) -> bytes:
    """As a careless writer writes it: NaN and lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged_json(value: Any, rng: random.Random) -> bytes:
    """In most cases of the structure."""
    return damaged_bytes(as_json(value), rng) if rng.random() < 0.3 else as_json(damaged_tree(value, rng))


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """Of the tiny LLaMA, by Hugging Face's names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (40, 8), "lm_head": (40, 8), "model.norm": (8,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj": s for n, s in zip("qkvo", [(8, 8), (4, 8), (4, 8), (8, 8)])}
        shapes |= {f"{layer}.mlp.{n}_proj": (8, 12) if n == "down" else (12, 8) for n in ("gate", "up", "down")}
        shapes |= {f"{layer}.{n}_layernorm": (8,) for n in ("input", "post_attention")}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def safetensors(arrays: dict[str, np.ndarray], change: Callable[[dict], Any] = lambda header: header) -> bytes:
    """The bytes of a file, with a changed header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = as_json(change(header))
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values())


@functools.cache
def packed() -> dict[str, bytes]:
    """The files of a packed model: bitmaps, and a kernel that is capped."""
    from jprune.checkpoints.checkpoint import Checkpoint
    from jprune.checkpoints.packed.write import Writer
    from jprune.checkpoints.source import Source, StoredTensor
    from jprune.models import families
    from jprune.models.parameters import shapes
    from jprune.sparse import Packing

    config = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 64}
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes(families.config(config)).items()}
    arrays["blocks/0/mlp/gate/kernel"][::2] = 0
    arrays["blocks/0/mlp/up/kernel"][rng.random((64, 128)) < 0.6] = 0
    stored = {
        path: StoredTensor(shape=array.shape, dtype=array.dtype, where="", read=array.copy)
        for path, array in arrays.items()
    }
    source = Source(config=config, tensors=stored, layout="jprune", side_files=dict, identity=str)
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder), Checkpoint("random", source), packing=Packing(values="int8")) as writer:
            for path, array in arrays.items():
                writer.write(path, array)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@functools.cache
def tokenizer() -> dict[str, Any]:
    """tokenizer.json of forty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return json.loads(made.to_str())


@functools.cache
def configs() -> list[dict[str, Any]]:
    """A small config.json of every architecture."""
    from jprune.models import families

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 4, "intermediate_size": 28, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    return [
        {"architectures": [architecture], "model_type": "x"}
        | {family.names.get(k, k): v for k, v in sizes.items() if family.names.get(k, k) in family.defaults}
        | family.variants[0]
        for family in families.FAMILIES
        for architecture in family.architectures
    ]


@functools.cache
def gguf() -> bytes:
    """The tiny LLaMA as a GGUF file, heads in Hugging Face's order: its sums are wrong, its form is right."""
    from gguf import GGUFWriter

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        _write_gguf(GGUFWriter(file.name, "llama"))
        return Path(file.name).read_bytes()


def _write_gguf(writer: Any) -> None:
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(4)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(40)])
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, tensor in tensors().items():
        name = key.removesuffix(".weight")
        if name not in whole:
            _, _, block, part = name.split(".", 3)
            name = f"blk.{block}.{parts[part]}"
        writer.add_tensor(f"{whole.get(name, name)}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def parquet() -> bytes:
    """Four rows of text."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()
