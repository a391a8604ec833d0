"""Which experts a router sends a token to, and how much each of them counts.

Softmax over all experts and the best few of them (Shazeer et al., arXiv:1701.06538; Fedus et al., arXiv:2101.03961), or
DeepSeek's: experts in groups of which a token goes to the best few (DeepSeek-V2, arXiv:2405.04434, section 2.2.2), and
sigmoids with a correction that is learnt by how busy experts are, which decides where a token goes but not how much it
counts there (DeepSeek-V3, arXiv:2412.19437, equations 12 to 16).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jprune.annotations import Array, Float, Int

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a router's logits become experts and their weights."""

    per_token: int
    """Experts that a token goes to; all of them if there are fewer."""
    scores: str = "softmax"
    """What logits become, one of `SCORES`."""
    normalise: bool = False
    """The weights of a token's experts sum to one (before `scale`), and not those of all experts."""
    scale: float = 1.0
    """Of the weights."""
    groups: int = 1
    """Equal groups in which the experts are numbered one after the other."""
    groups_per_token: int = 1
    """Groups that the experts of a token may be of: those of the best."""
    float32: bool = False
    """Logits are float32 products, whatever dtype the tokens have."""
    group_best: int = 1
    """The score of a group is the sum of those of so many of its best experts."""


class Routes(NamedTuple):
    """Where every token goes."""

    experts: Int[Array, "... k"]
    """The numbers of its experts, no two equal, the best first."""
    weights: Float[Array, "... k"]
    """How much of what each of them gives is added, float32."""


def route(logits: Float[Array, "... E"], routing: Routing, correction: Float[Array, "E"] | None = None) -> Routes:
    """The experts of the largest scores.

    Args:
      logits: what the router gives.
      routing: how they are read.
      correction: added to the scores by which experts are chosen, and not to those they are weighted by.
    """
    wide = logits.astype(jnp.float32)
    scores = jax.nn.softmax(wide, axis=-1) if routing.scores == "softmax" else jax.nn.sigmoid(wide)
    choice = scores if correction is None else scores + correction.astype(jnp.float32)
    if routing.groups > 1:
        choice = jnp.where(_in_best_groups(choice, routing), choice, -jnp.inf)
    weights, experts = jax.lax.top_k(choice, min(routing.per_token, choice.shape[-1]))
    if choice is not scores:
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts, weights if routing.scale == 1.0 else weights * routing.scale)


def _in_best_groups(choice: Float[Array, "... E"], routing: Routing) -> Array:
    """Whether an expert is of one of a token's groups, bool [..., E]."""
    grouped = choice.reshape(*choice.shape[:-1], routing.groups, -1)
    best = jax.lax.top_k(grouped, min(routing.group_best, grouped.shape[-1]))[0].sum(axis=-1)
    _, groups = jax.lax.top_k(best, routing.groups_per_token)
    allowed = jnp.any(jax.nn.one_hot(groups, routing.groups, dtype=bool), axis=-2)
    return jnp.repeat(allowed, grouped.shape[-1], axis=-1)


def spread(routes: Routes, count: int) -> Float[Array, "... E"]:
    """The weight of each of `count` experts for every token, float32; 0 where the token is not sent."""
    chosen = jax.nn.one_hot(routes.experts, count, dtype=jnp.float32)  # [..., k, experts]
    return jnp.sum(chosen * routes.weights[..., None], axis=-2)


def sent(routes: Routes, count: int) -> Array:
    """Whether a token is sent to each of `count` experts, bool [..., E]."""
    return jnp.any(jax.nn.one_hot(routes.experts, count, dtype=bool), axis=-2)
