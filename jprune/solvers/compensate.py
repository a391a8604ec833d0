"""Compensation: what is left of a kernel's inputs makes up for those that are removed, by least squares.

For a kernel W with inputs x and Gram matrix G = sum x x^T, of which the inputs K stay and R go, the new rows are

    W_K + (G_KK + d I)^{-1} G_KR W_R,

which is nearest to W_K in the damped least squares || x_K W' - x W ||^2 + d || W' - W_K ||^2: the update of Optimal
Brain Surgeon for all of R at once, as in SlimGPT (https://arxiv.org/abs/2412.18110) and, without the term of d, GRAIL.
Nothing changes where nothing is removed, and inputs that are linear combinations of kept ones cost nothing but damping.

The system is solved in the kernel's own size, with the rows and columns of R replaced by those of the identity: so one
program serves every choice of K, and K may be traced.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune import devices
from jprune.annotations import Array, Bool, Float, Shaped
from jprune.errors import JpruneError
from jprune.solvers._sweep import Factor
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.trees import check_floating


def compensate(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "_ _"],
    keep: Shaped[Array | np.ndarray, "_"],
    *,
    damping: float = 0.01,
    where: str = "kernel",
) -> Pruned:
    """Removes inputs of a kernel, and refits what it does with the others so that its outputs stay near.

    Args:
      kernel: weights, any float dtype; solved in float32.
      gram: sum over the calibration tokens of x x^T (any positive multiple of it gives the same result).
      keep: which inputs stay, bool [d_in].
      damping: share of the mean diagonal, of the inputs that stay, that is added to the diagonal. Where the
        factorisation fails it is raised tenfold, at most twice. Inputs that were always zero keep their weights.
      where: what messages call the kernel.

    Returns:
      `Pruned`: the kernel in its shape and dtype, rows of removed inputs zero (`jprune.shrink` cuts them out); the
      mask; and the loss 1/2 tr(D^T G D), D = new - old weights, without damping.

    Raises:
      JpruneError: the kernel's dtype is no float; shapes that do not fit; no input stays; the Gram matrix is not
        finite, has a negative diagonal or cannot be factorised (not raised under `jax.jit`, where the result is NaN).
    """
    check_floating(kernel, where)
    if not isinstance(keep, jax.core.Tracer):
        keep = np.asarray(keep)
    if kernel.ndim != 2 or gram.shape != (len(kernel),) * 2 or keep.shape != (len(kernel),) or keep.dtype != bool:
        raise JpruneError(
            f"{where}: expected a kernel [d_in, d_out], a Gram matrix [d_in, d_in] and a mask [d_in] of bools, got "
            f"{kernel.shape}, {gram.shape} and {keep.shape} of {keep.dtype}"
        )
    if not isinstance(keep, jax.core.Tracer) and not keep.any():
        raise JpruneError(f"{where}: none of its {len(kernel)} inputs stays, so nothing can make up for the others")
    factor = devices.on_one_device(_factorise, gram, keep, damping)
    check_factor(factor, gram, where)
    return _solve(kernel, gram, keep, factor.upper)


@jax.jit
def _factorise(gram: Float[Array, "d_in d_in"], keep: Bool[Array, "d_in"], damping: Float[Array, ""] | float) -> Factor:
    """Of the Gram matrix of the inputs that stay, in which the others are dead; NaN if the whole one is none."""
    inside = jnp.where(keep[:, None] & keep, gram.astype(jnp.float32), 0.0)
    sound = jnp.all(jnp.isfinite(gram)) & jnp.all(jnp.diagonal(gram) >= 0)
    return factorise(jnp.where(sound, inside, jnp.nan), damping)


@jax.jit
def _solve(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    keep: Bool[Array, "d_in"],
    upper: Float[Array, "d_in d_in"],
) -> Pruned:
    old, gram = kernel.astype(jnp.float32), gram.astype(jnp.float32)
    stays = keep[:, None]
    pull = jnp.matmul(gram, jnp.where(stays, 0.0, old), precision="highest")
    half = lax.linalg.triangular_solve(upper, jnp.where(stays, pull, 0.0), left_side=True, lower=False)
    moved = lax.linalg.triangular_solve(upper, half, left_side=True, lower=False, transpose_a=True)
    new = jnp.where(stays, old + moved, 0.0).astype(kernel.dtype)
    change = new.astype(jnp.float32) - old
    loss = 0.5 * jnp.sum(change * jnp.matmul(gram, change, precision="highest"))
    return Pruned(new, jnp.broadcast_to(stays, kernel.shape), loss)
