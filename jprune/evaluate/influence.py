"""How much every block changes the hidden states that pass through it, over calibration text, one block at a time."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike

from jprune.annotations import Array, Float, Float64, Int32
from jprune.models import decoder
from jprune.models.batching import windows_at_once
from jprune.models.weights import NativeWeights
from jprune.structured.importance import block_influence


def block_influences(
    weights: NativeWeights,
    tokens: Int32[np.ndarray, "n L"],
    *,
    dtype: DTypeLike,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float64[np.ndarray, " layers"]:
    """`structured.importance.block_influence` of every block over n windows of text.

    Args:
      weights: the model, read part by part.
      tokens: the windows.
      dtype: of the activations.
      progress: called with blocks done and their number.
    """
    config = weights.config
    embed = jax.jit(decoder.embed(config))
    size = windows_at_once(tokens.shape[1])
    params = {"embed": weights.params("embed")}
    batches = [np.asarray(embed(params, tokens[i : i + size]).astype(dtype)) for i in range(0, len(tokens), size)]
    del params
    influences = np.zeros(config.layers)
    for i in range(config.layers):
        params = jax.tree.map(jax.numpy.asarray, weights.params(f"blocks/{i}"))
        step = _step(decoder.block(config, i))
        for j, x in enumerate(batches):
            y, influence = step(params, x)
            batches[j] = np.asarray(y)
            influences[i] += float(influence) * len(x) / len(tokens)
        progress(i + 1, config.layers)
    return influences


@functools.lru_cache(maxsize=64)
def _step(block: Callable) -> Callable:
    @jax.jit
    def step(params: dict, x: Float[Array, "B L d"]) -> tuple[Float[Array, "B L d"], Float[Array, ""]]:
        y = block(params, x)
        return y, block_influence(x, y)

    return step
