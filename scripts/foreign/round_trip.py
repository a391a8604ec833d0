"""A small Llama's way from a Hugging Face folder into another library, pruned there, and back, as a line of JSON.

Run by foreign_models.py, in the library's environment. What goes there and back is compared with jprune's own decoder,
which knows nothing of the library: it reads the folder before and the folder after.
"""

import importlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import jprune

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CLOSE = 1e-4
"""How much logits may differ; they are between 1 and 10."""


def make(folder: Path) -> None:
    """Writes a Llama with random weights, norms too, as Hugging Face has it."""
    d, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 2 * CONFIG["head_dim"]
    shapes = {"model.embed_tokens.weight": (64, d), "lm_head.weight": (64, d), "model.norm.weight": (d,)}
    for i in range(CONFIG["num_hidden_layers"]):
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        mlp = {"gate_proj": (inner, d), "up_proj": (inner, d), "down_proj": (d, inner)}
        shapes |= {f"model.layers.{i}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{i}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    drawn = np.random.default_rng(0)
    tensors = {
        name: drawn.uniform(0.5, 1.5, shape) if len(shape) == 1 else drawn.normal(0, 2 / shape[-1] ** 0.5, shape)
        for name, shape in shapes.items()
    }
    save(folder, {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, CONFIG)


def save(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> None:
    """Writes a Hugging Face folder; a model that has a tokenizer needs its files copied too."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def difference(folder: Path, tokens, logits) -> float:
    """The largest difference of a library's logits from those of the folder, by jprune's decoder."""
    checkpoint = jprune.load(folder)
    return float(jnp.max(jnp.abs(jprune.decoder.apply(checkpoint.config, checkpoint.params(), tokens) - logits)))


def main() -> None:
    """Goes the way of the recipe that the first word names; the second is the package it is made of."""
    name, package = sys.argv[1:]
    recipe = importlib.import_module(name)
    with tempfile.TemporaryDirectory() as work:
        dense, sparse = Path(work) / "dense", Path(work) / "sparse"
        make(dense)
        logits, params, args = recipe.load(dense)
        pattern = jprune.NM(2, 4)
        pruned, masks = jprune.prune_function(logits, params, [args], jprune.SparseGPT(), pattern, where=recipe.BLOCKS)
        tensors = recipe.tensors(pruned, dense)
        save(sparse, tensors, json.loads((dense / "config.json").read_text()))
        back = recipe.tensors(params, dense)
        before, after = load_file(dense / "model.safetensors"), load_file(sparse / "model.safetensors")
        out = jax.jit(logits)
        found = {
            "round_trip": name,
            "version": f"{package} {importlib.metadata.version(package)}",
            "jax": jax.__version__,
            "values": max(float(np.max(np.abs(back[name] - tensor))) for name, tensor in before.items()),
            "dense": difference(dense, args[0], out(params, *args)),
            "pruned": difference(sparse, args[0], out(pruned, *args)),
            "moved": float(jnp.max(jnp.abs(out(params, *args) - out(pruned, *args)))),
            "masked": sum(int(np.sum(~np.asarray(mask))) for mask in masks.values()),
            "zeros": sum(int(np.sum(tensor == 0)) for tensor in after.values()),
        }
    halves = [after[k].reshape(-1, 4) for k in after if "proj" in k]  # [out, in]: four consecutive inputs of an output
    checks = {
        "names or shapes": {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()},
        "logits before": not found["dense"] < CLOSE,
        "logits after": not found["pruned"] < CLOSE,
        "nothing pruned": not found["moved"] > 100 * CLOSE,
        "zeros": not found["masked"] == found["zeros"] == sum(half.size // 2 for half in halves),
        "pattern": not all((np.sum(half == 0, axis=1) == 2).all() for half in halves),
    }
    print(json.dumps({**found, "misses": [name for name, missed in checks.items() if missed]}))


if __name__ == "__main__":
    main()
