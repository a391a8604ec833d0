"""A few kernels trained by themselves: Adam on the kept weights, and the best of what held-out data saw.

For the reconstruction of a part of a network (BESA, Wanda++, arXiv:2503.04992; arXiv:2510.14444 for attention and
feed-forward apart): the loss is how far the part's outputs are from those that are wanted. Weights are float32 while
they are trained, pruned ones stay exactly zero, and steps are shares of the root mean square of a kernel's kept
weights, so that one rate does for all kernels and models.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jprune.annotations import Array, Float

Kernels = Mapping[str, Any]
ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)


class Local(NamedTuple):
    """Kernels while they are trained."""

    weights: dict[str, Float[Array, "..."]]
    """float32, by path."""
    moments: Any
    """Of Adam."""


def begin(kernels: Kernels) -> Local:
    """Kernels that have been pruned, before the first step."""
    weights = {path: jnp.array(x, jnp.float32) for path, x in kernels.items()}  # copies, that steps may overwrite
    return Local(weights, ADAM.init(weights))


def step(loss: Callable[[Kernels], Float[Array, ""]], state: Local, pruned: Kernels, rate: Float[Array, ""]) -> Local:
    """One step down.

    Args:
      loss: of the kernels, in the dtypes of `pruned`.
      state: before.
      pruned: the kernels that `begin` took: what is zero there stays zero.
      rate: the step of Adam, as a share of the size of the kernel's kept weights.
    """
    with jax.numpy_dtype_promotion("standard"):  # Optax raises numbers of Python to those of arrays
        return _step(loss, state, pruned, rate)


def _step(loss: Callable[[Kernels], Float[Array, ""]], state: Local, pruned: Kernels, rate: Float[Array, ""]) -> Local:
    grads = jax.grad(lambda weights: loss(of_dtypes(weights, pruned)))(state.weights)
    updates, moments = ADAM.update(grads, state.moments)
    weights = {
        path: w - rate * _size(pruned[path]) * _kept(updates[path], pruned[path]) for path, w in state.weights.items()
    }
    return Local(weights, moments)


def of_dtypes(weights: Kernels, pruned: Kernels) -> dict[str, Array]:
    """Trained weights in the dtypes that they are to have, with the zeros of `pruned`."""
    return {path: _kept(w, pruned[path]).astype(pruned[path].dtype) for path, w in weights.items()}


def _kept(values: Array, pruned: Array) -> Array:
    return jnp.where(pruned != 0, values, jnp.zeros_like(values))


def _size(pruned: Array) -> Float[Array, ""]:
    """The root mean square of what is kept."""
    x = pruned.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(x * x) / jnp.maximum(jnp.sum(x != 0), 1).astype(jnp.float32))
