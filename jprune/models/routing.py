"""Which experts a router sends a token to, and how much each of them counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jprune.annotations import Array, Float, Int


class Routes(NamedTuple):
    """Where every token goes."""

    experts: Int[Array, "... k"]
    """The numbers of its experts, no two equal, the best first."""
    weights: Float[Array, "... k"]
    """How much of what each of them gives is added, float32."""


def route(logits: Float[Array, "... E"], per_token: int, *, normalise: bool) -> Routes:
    """The experts of the largest logits, weighted by their softmax.

    Args:
      logits: what the router gives.
      per_token: how many experts a token goes to; all of them if there are fewer.
      normalise: whether the weights of a token's experts sum to one, and not those of all experts.
    """
    odds = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(odds, min(per_token, odds.shape[-1]))
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts, weights)


def spread(routes: Routes, count: int) -> Float[Array, "... E"]:
    """The weight of each of `count` experts for every token, float32; 0 where the token is not sent."""
    chosen = jax.nn.one_hot(routes.experts, count, dtype=jnp.float32)  # [..., k, experts]
    return jnp.sum(chosen * routes.weights[..., None], axis=-2)


def sent(routes: Routes, count: int) -> Array:
    """Whether a token is sent to each of `count` experts, bool [..., E]."""
    return jnp.any(jax.nn.one_hot(routes.experts, count, dtype=bool), axis=-2)
