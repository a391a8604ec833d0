"""Weights of tokens: what each counts in a statistic, as padding counts nothing.

A token of weight w counts w times in every sum; one of weight 0 is not read at all, so its inputs may be NaN. Weights
that are negative or not finite are refused; under a trace no value can be looked at, and those that are negative or NaN
count as 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jprune.annotations import Array, Float, Int, Shaped
from jprune.errors import JpruneError

Weights = Shaped[Array | np.ndarray, "..."]
"""[tokens], what each counts: a number of at least 0, or whether it counts at all."""


def checked(weights: Weights, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Weights of tokens as float32.

    Raises:
      JpruneError: they are not of `shape`, or some are negative or not finite.
    """
    if weights.shape != shape:
        raise JpruneError(f"expected weights of shape {shape}, one for each token, got {weights.shape}")
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights)
        if not ((values >= 0) & (values < np.inf)).all():
            raise JpruneError("expected weights of tokens of at least 0, found some that are negative or not finite")
    weights = jnp.asarray(weights).astype(jnp.float32)
    return jnp.where(weights > 0, weights, 0.0)


def each(x: Float[Array, "tokens d_in"], weights: Weights | None) -> Float[Array, "tokens"]:
    """The weight of every token, float32; 1 where none are given."""
    if weights is None:
        return jnp.ones(len(x), jnp.float32)
    return checked(weights, x.shape[:1])


def scaled(
    x: Float[Array, "tokens d_in"], weights: Weights | None
) -> tuple[Float[Array, "tokens d_in"], Int[Array, ""] | int]:
    """Inputs of which every product of two counts as its token's weight says, and how many tokens count."""
    if weights is None:
        return x, len(x)
    roots = jnp.sqrt(each(x, weights))[:, None]  # exact where weights are 0 and 1
    return jnp.where(roots > 0, x.astype(jnp.float32) * roots, 0.0), jnp.sum(roots > 0, dtype=jnp.int32)
