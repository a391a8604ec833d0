"""Scores: how much each element of a kernel matters. Same shape as the kernel, higher = keep.

Sources: magnitude pruning (Han et al. 2015, https://arxiv.org/abs/1506.02626); Wanda (Sun et al. 2023,
https://arxiv.org/abs/2306.11695, eq. 1). Scores are float32 whatever the kernel's dtype: comparing in half precision,
as the authors' magnitude baseline does, makes thousands of false ties.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def magnitude(kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
    """|W|."""
    return jnp.abs(kernel.astype(jnp.float32))


@jax.jit
def wanda(kernel: Float[Array, "d_in d_out"], squared_norm: Float[Array, "d_in"]) -> Float[Array, "d_in d_out"]:
    """|W_ij| ||x_i||, with ||x_i||^2 = `squared_norm[i]` summed over the calibration tokens.

    The authors divide the squared norm by the number of sequences; that is one factor for the whole kernel and does
    not change what is kept.
    """
    norm = jnp.sqrt(squared_norm.astype(jnp.float32))
    return jnp.abs(kernel.astype(jnp.float32)) * norm[:, None]
