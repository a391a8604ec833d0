"""The compiled programs that train the kernels of a part, all of them together, towards what the dense part gives.

What is wanted is what the dense weights make of the pruned model's hidden states; where the dense model is computed
too, what they make of its own: then a block makes up for errors of those before it as well.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jprune import devices, trees
from jprune.annotations import Array, Float
from jprune.pipeline.forecast.programs import Arrays, Spec
from jprune.train import locally

Params = dict[str, Any]  # by path in the part


@functools.lru_cache(maxsize=64)
def wanted(spec: Spec) -> Any:
    """What the part is to give, of the hidden states of every stream."""

    def wanted(dense: Params, hidden: Arrays) -> Float[Array, "B T d_model"]:
        return spec.function(trees.unflatten(dense), hidden[-1])

    return jax.jit(devices.within(spec.mesh, wanted), out_shardings=spec.sharding)


@functools.lru_cache(maxsize=64)
def error(spec: Spec) -> Any:
    """The mean squared error with the kernels as they are while they are trained."""

    def error(weights: Params, pruned: Params, rest: Params, target: Array, x: Array) -> Float[Array, ""]:
        return _error(spec.function, together(locally.of_dtypes(weights, pruned), rest), target, x)

    return jax.jit(devices.within(spec.mesh, error))


@functools.lru_cache(maxsize=64)
def step(spec: Spec) -> Any:
    """One step of Adam on one micro-batch, down the error as a share of `scale`."""

    def step(
        state: locally.Local, pruned: Params, rest: Params, target: Array, x: Array, scale: Array, rate: Array
    ) -> locally.Local:
        def loss(kernels: Mapping[str, Any]) -> Array:
            return _error(spec.function, together(kernels, rest), target, x) / scale

        return locally.step(loss, state, pruned, rate)

    return jax.jit(devices.within(spec.mesh, step), donate_argnums=0)


def together(kernels: Mapping[str, Any], rest: Params) -> Params:
    """The parameters of a part; a stack that is in both has zeros in each for the kernels that the other has."""
    return rest | {path: x + rest[path] if path in rest else x for path, x in kernels.items()}


def _error(function: Callable, params: Params, target: Array, x: Array) -> Float[Array, ""]:
    got = function(trees.unflatten(params), x)
    return jnp.mean(jnp.square(got.astype(jnp.float32) - target.astype(jnp.float32)))
