"""Models on the road of PyTorch's modules, and what transformers computes of the same folders."""

import hf_families as hf
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from jprune.checkpoints import huggingface, load

SMALL = {
    "vocab_size": hf.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def saved(folder, architecture, **options):
    """A random model, saved by transformers."""
    hf.save(hf.model(architecture, options), folder)
    return folder


def opened(folder, monkeypatch):
    """A folder as if its architecture had no table."""
    with monkeypatch.context() as patched:
        patched.setattr(huggingface.bridged, "lacking", lambda hf_config: "it is tested")
        return load(folder)


def logits(checkpoint, tokens):
    """Of a model in blocks."""
    model = checkpoint.model
    x = jax.jit(model.embed)({"embed": checkpoint.params("embed")}, jnp.asarray(tokens))
    for i, block in enumerate(model.blocks):
        x = jax.jit(block)(checkpoint.params(f"blocks/{i}"), x)
    return np.asarray(jax.jit(model.head)({name: checkpoint.params(name) for name in model.head_parts}, x))


def theirs(folder):
    """The folder as transformers loads it: every tensor found, and none left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def tensors(folder):
    return load_file(folder / "model.safetensors")


def check_alike(native, through):
    """Two pruned folders have the same zeros, but for ties, and the same weights elsewhere."""
    native, through = tensors(native), tensors(through)
    assert native.keys() == through.keys()
    for key, values in native.items():
        apart = (values == 0) != (through[key] == 0)
        assert apart.mean() <= 0.01, key  # ties
        np.testing.assert_allclose(through[key][~apart], values[~apart], atol=1e-4, err_msg=key)
