"""Tiny models on disk, written by the `safetensors` package, so that our reader and writer are checked against it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama_bias": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config(family: str = "llama", *, tied: bool = False, dtype: str = "float32") -> dict:
    return FAMILIES[family] | {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face's tensors of a model, written out by hand."""
    width, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    qwen2, qwen3 = config["model_type"] == "qwen2", config["model_type"] == "qwen3"
    out = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, width)
    for i in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (q, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (width, q),
            "mlp.gate_proj.weight": (ff, width),
            "mlp.up_proj.weight": (ff, width),
            "mlp.down_proj.weight": (width, ff),
        }
        if qwen2 or config.get("attention_bias"):
            block |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        if config.get("attention_bias"):
            block["self_attn.o_proj.bias"] = (width,)
        if config.get("mlp_bias"):
            block |= {"mlp.gate_proj.bias": (ff,), "mlp.up_proj.bias": (ff,), "mlp.down_proj.bias": (width,)}
        if qwen3:
            block |= {f"self_attn.{n}_norm.weight": (config["head_dim"],) for n in "qk"}
        out |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return out


def tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = DTYPES[config["torch_dtype"]]
    return {name: (rng.standard_normal(shape) * 0.3).astype(dtype) for name, shape in shapes(config).items()}


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    keys = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_by_transformers(path: Path, hf_config: dict) -> dict[str, np.ndarray]:
    """The tensors that transformers' own reader of GGUF files makes of one, by their Hugging Face keys."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    given = {k: v for k, v in hf_config.items() if k not in ("architectures", "model_type")}
    ids = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(hf_config["model_type"], **given | ids)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return {key: tensor.numpy() for key, tensor in read.items()}


class Tiny:
    """The functions above, as a fixture (test modules cannot import one another)."""

    config = staticmethod(config)
    shapes = staticmethod(shapes)
    tensors = staticmethod(tensors)
    write = staticmethod(write)
    write_sharded = staticmethod(write_sharded)
    read_by_transformers = staticmethod(read_by_transformers)
    families = tuple(FAMILIES)
    dtypes = DTYPES


@pytest.fixture(scope="session")
def tiny():
    return Tiny


@pytest.fixture
def folder(tmp_path, tiny):
    """A random small Llama as a Hugging Face folder, one file."""
    settings = tiny.config()
    return tiny.write(tmp_path / "model", settings, tiny.tensors(settings))
