"""Targets from the dense model: the weights that, for the inputs of the pruned model, give the dense model's outputs.

A solver that reconstructs X' W for the inputs X' that reach a kernel in the pruned model keeps what is wrong with them:
errors add up from layer to layer. With X the inputs in the dense model and a strength s, minimise instead

    ||X' V - ((1 - s) X' + s X) W||^2 + damping ||V - W||^2

over V, before anything is pruned. With G = X'^T X', H = G + damping and the cross-Gram C = X'^T X the answer is

    V = W + s H^-1 (C - G) W,

and what a solver then makes of V under a pattern is as good towards the mixed outputs, since the two losses differ by a
constant. At s = 0 it is W. At s = 1 V is what least squares makes of the dense outputs. The idea is that of QEP (2025,
https://arxiv.org/abs/2504.09629), which has it for quantisation.

Outputs that are added to a residual stream, which is h' in the pruned model and h in the dense one, can take away
something of its error too: what is wanted is that h' + X' V is h' + X' W in the share 1 - s and h + X W in the share s,

    V = W + s H^-1 ((C - G) W + X'^T (h - h')).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jprune.annotations import Array, Float, Shaped
from jprune.errors import JpruneError
from jprune.solvers._sweep import Factor
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.trees import check_floating


def dense_targets(
    kernel: Shaped[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    apart: Float[Array, "d_in d_in"],
    strength: float,
    *,
    damping: float = 0.01,
    residual: Float[Array, "d_in d_out"] | None = None,
) -> Float[Array, "d_in d_out"]:
    """The weights to prune towards, float32.

    Args:
      kernel: weights of the dense model, any float dtype.
      gram: sum over the calibration tokens of x' x'^T, x' being the inputs in the pruned model.
      apart: sum over them of x' (x - x')^T, the cross-Gram with the dense model's inputs x less `gram`; both as
        `jprune.cross_gram.CrossGram` has them.
      strength: s, from 0 to 1.
      damping: share of the mean diagonal added to the diagonal; raised as in `jprune.solvers.sparsegpt`.
      residual: sum over the tokens of x' (h - h')^T, if the outputs are added to a residual stream.

    Raises:
      JpruneError: the strength is not between 0 and 1; the kernel's dtype is no float; the Gram matrix cannot be
        factorised; `residual` does not fit the kernel.
    """
    check_strength(strength, "strength")
    check_floating(kernel, "kernel")
    factor = factorise(gram, damping)
    check_factor(factor, gram, "kernel")
    return towards_dense({"kernel": kernel}, factor, apart, strength, residual)["kernel"]


def check_strength(strength: float, name: str) -> None:
    """Raises a `JpruneError` unless a strength is between 0 and 1."""
    if not 0 <= strength <= 1:
        raise JpruneError(
            f"{name} must be between 0, the pruned model's own inputs, and 1, the dense model's; got {strength}"
        )


def towards_dense(
    kernels: Mapping[str, Shaped[Array, "d_in _"]],
    factor: Factor,
    apart: Float[Array, "d_in d_in"],
    strength: float,
    residual: Float[Array, "d_in d_out"] | None = None,
) -> dict[str, Float[Array, "d_in _"]]:
    """The weights to prune towards of kernels that read one input, with what is factorised of it."""
    change = _solved(factor, apart)
    moved = {name: _moved(kernel, change, jnp.float32(strength)) for name, kernel in kernels.items()}
    if residual is None:
        return moved
    for name, kernel in kernels.items():
        if len(kernels) > 1 or kernel.shape != residual.shape:
            raise JpruneError(
                f"{name}: expected one kernel of shape {residual.shape}, whose outputs are added to what `residual` is "
                f"of, got {', '.join(f'{n} {k.shape}' for n, k in kernels.items())}; leave it None for the others"
            )
    back = jnp.float32(strength) * _solved(factor, residual)
    return {name: kernel + back for name, kernel in moved.items()}


@jax.jit
def _solved(factor: Factor, right: Float[Array, "d_in _"]) -> Float[Array, "d_in _"]:
    """H^-1 of a right-hand side; zero for dead inputs."""
    half = lax.linalg.triangular_solve(factor.upper, right.astype(jnp.float32), left_side=True)
    return lax.linalg.triangular_solve(factor.upper, half, left_side=True, transpose_a=True)


@jax.jit
def _moved(
    kernel: Float[Array, "d_in d_out"], change: Float[Array, "d_in d_in"], strength: Float[Array, ""]
) -> Float[Array, "d_in d_out"]:
    dense = kernel.astype(jnp.float32)
    return dense + strength * jnp.matmul(change, dense, precision="highest")
