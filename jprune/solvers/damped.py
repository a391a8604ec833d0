"""The Gram matrix that solvers solve with: damped, and with something in place of what no token says.

H = G + damping mean(diag G) I, the mean being that of live inputs. Dead inputs, which were zero for every token (G_ii =
0), would make it singular and the mean too small; on their diagonal is that mean instead.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jprune.annotations import Array, Bool, Float


class Live(NamedTuple):
    """What is known of the diagonal of a Gram matrix."""

    dead: Bool[Array, "d_in"]
    """Inputs that were zero for every token."""
    mean: Float[Array, ""]
    """Mean of the diagonal over the others; 1 if there are none, NaN if some number is no sum of squares."""


def live(gram: Float[Array, "d_in d_in"]) -> Live:
    """Which inputs are dead, and the mean diagonal of the others."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1.0)
    return Live(dead, jnp.where(jnp.any(diagonal < 0), jnp.nan, mean))  # damping might hide what is negative


def damped(
    gram: Float[Array, "d_in d_in"], damping: Float[Array, ""] | float
) -> tuple[Float[Array, "d_in d_in"], Live]:
    """H / mean, float32, and what it was made of. Its size is then that of no data."""
    gram = gram.astype(jnp.float32)
    known = live(gram)
    return gram / known.mean + jnp.diag(known.dead.astype(jnp.float32) + damping), known
