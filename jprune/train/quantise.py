"""Frozen kernels in int8: a quarter of the memory of float32 while adapters beside them are trained.

Symmetric, one scale per output: ``values = round(kernel / scale)`` with ``scale = max |kernel| / 127`` over the inputs
of an output. Zeros stay exactly zero. Every other element is off by at most half a scale.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jprune import trees
from jprune.annotations import Array, Float, Int8

PyTree = Any


class Quantised(NamedTuple):
    """A kernel as whole numbers and the scale of each output."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]  # float32, of size one along the input axes

    def dequantise(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The kernel, up to rounding."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantise(kernel: Float[Array, "..."], in_axes: tuple[int, ...]) -> Quantised:
    """A kernel in int8; along other axes than `in_axes` (outputs, layers of a stacked kernel) each has its scale."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=in_axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Quantised(jnp.round(wide / scale).astype(jnp.int8), scale)


def quantise_tree(params: PyTree, in_axes: Mapping[str, tuple[int, ...]]) -> PyTree:
    """Parameters with the kernels named in `in_axes` quantised."""
    leaves = trees.flatten(params)
    return trees.replace(params, {p: quantise(x, in_axes[p]) if p in in_axes else x for p, x in leaves.items()})


def dequantise_tree(params: PyTree, dtype: DTypeLike) -> PyTree:
    """Parameters with every quantised kernel as an array again."""

    def is_quantised(x: Any) -> bool:
        return isinstance(x, Quantised)

    return jax.tree.map(lambda x: x.dequantise(dtype) if is_quantised(x) else x, params, is_leaf=is_quantised)
