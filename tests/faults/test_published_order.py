"""SparseGPT's headline families: its order of methods on random models whose inputs are correlated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import trees
from jprune.models import decoder, families
from jprune.patterns import Unstructured
from jprune.statistics import Gram, SquaredNorm

OPT = {"model_type": "opt", "hidden_size": 48, "num_attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 64}
BLOOM = {"model_type": "bloom", "hidden_size": 48, "n_head": 4}


@pytest.mark.parametrize("hf_config", [OPT, BLOOM], ids=["opt", "bloom"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sparsegpt_then_wanda_then_magnitude(hf_config, seed):
    """Reconstruction loss |X W - X W'|^2 / |X W|^2, mean over the kernels of a block, in float64."""
    config = families.config(hf_config | {"num_hidden_layers": 1, "n_layer": 1, "vocab_size": 16})
    rng = np.random.default_rng(seed)
    params = trees.flatten(decoder.init_params(config, jax.random.key(seed))["blocks"]["0"])
    params = {path: np.asarray(x) * (5 if path.endswith("kernel") else 1) for path, x in params.items()}
    for path in params:  # features of very different size, as trained norms make them
        if path.endswith("norm/scale"):
            params[path] = np.exp(rng.normal(0, 1, params[path].shape)).astype(np.float32)
    params = trees.unflatten({path: jnp.asarray(x) for path, x in params.items()})
    mix = rng.normal(size=(config.d_model, config.d_model)) / (1 + np.arange(config.d_model))[:, None]
    x = jnp.asarray(rng.normal(size=(16, 32, config.d_model)) @ mix, jnp.float32)

    block = decoder.block(config, 0)
    grams = jax.jit(jprune.observe(block, Gram))(params, x)[1]
    norms = jax.jit(jprune.observe(block, SquaredNorm))(params, x)[1]
    methods = {
        "sparsegpt": (jprune.SparseGPT(), grams),
        "wanda": (jprune.Wanda(), norms),
        "magnitude": (jprune.Magnitude(), None),
    }
    in_axes = {m.path: m.in_axes for m in jprune.matmuls(block, params, x)}
    losses = {}
    for name, (method, statistics) in methods.items():
        pruned, _ = jprune.prune(params, statistics, method, Unstructured(0.5), in_axes=in_axes)
        ratios = []
        for path, axes in in_axes.items():
            before, after = (
                np.asarray(trees.to_matrix(trees.flatten(tree)[path], axes), np.float64) for tree in (params, pruned)
            )
            gram = np.asarray(grams[path].total, np.float64)
            change = before - after
            ratios.append(np.sum(change * (gram @ change)) / np.sum(before * (gram @ before)))
        losses[name] = np.mean(ratios)
    assert losses["sparsegpt"] < 0.8 * losses["wanda"]
    assert losses["wanda"] < 0.9 * losses["magnitude"]
