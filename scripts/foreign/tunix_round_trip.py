"""Tunix: a Hugging Face folder read by Tunix' own loader, and its tensors by their names in Hugging Face again.

Tunix has no writer but for LoRA merged into an old folder. Its loader's table of names says how each tensor is turned;
turned back, they are what Hugging Face reads.
"""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tunix.models.llama3 import params as loader
from tunix.models.llama3.model import ModelConfig
from tunix.utils.torch_utils import torch_key_to_jax_key

import jprune

BLOCKS = "(attn|mlp)/.*_proj"
THETA = 1_000_000
"""What Tunix 0.1.7's Llama turns queries and keys by, whatever its `rope_theta` says."""


def config(folder):
    """What Tunix calls a config.json's entries."""
    hf = json.loads((folder / "config.json").read_text())
    if hf["rope_theta"] != THETA or hf.get("rope_scaling"):
        raise SystemExit(f"{folder}: Tunix' Llama has rotary angles of {THETA:,} without scaling, config.json others")
    return ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )


def load(folder):
    """The model as a function of its parameters, and tokens to calibrate it with."""
    graph, params = nnx.split(loader.create_model_from_safe_tensors(str(folder), config(folder)))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (8, 16)))
    positions = jnp.broadcast_to(jnp.arange(16), (8, 16))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((16, 16), bool)), (8, 16, 16))

    def logits(params, tokens, positions, mask):
        return nnx.merge(graph, params)(tokens, positions, None, mask)[0]

    return logits, params, (tokens, positions, mask)


def tensors(params, folder):
    """Tensors by the names that the folder has: each is given back the shape that it was turned to, and turned back."""
    leaves = jprune.trees.flatten(params)
    table = loader._get_key_and_transform_mapping(config(folder))
    found = {}
    for name, old in load_file(folder / "model.safetensors").items():
        path, turned = torch_key_to_jax_key(table, name)
        axes = (turned and turned[0]) or range(old.ndim)
        leaf = np.asarray(leaves[path.replace(".", "/")])
        found[name] = leaf.reshape([old.shape[i] for i in axes]).transpose(np.argsort(axes))
    return found
