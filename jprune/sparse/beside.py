"""Adapters beside packed kernels: y = x W + (alpha / r) (x A) B, W packed and frozen, A and B trained.

`jprune.train.lora.adapt` finds matmuls in a function's jaxpr, where a packed kernel is none. Here the kernel itself
does the two small products, so the function stays as it is.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.models.kernels import Kernel, flatten, multiply
from jprune.train import lora

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Kernel):
    """A kernel with an adapter beside it.

    Attributes:
      kernel: packed, or an array.
      a: `[*d_in, r]`.
      b: `[r, *d_out]`.
      scale: alpha / r.
    """

    kernel: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return tuple(self.kernel.shape)

    @property
    def dtype(self) -> np.dtype:
        """That of the kernel."""
        return jnp.dtype(self.kernel.dtype)

    @property
    def kind(self) -> Hashable:
        """That of the kernel, and of the adapter its shape."""
        own = self.kernel.kind if isinstance(self.kernel, Kernel) else (self.shape, self.dtype)
        return ("adapted", own, tuple(self.a.shape), self.scale)

    def multiply(self, x: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
        """[..., *d_in] x -> [..., *d_out] in x's dtype."""
        beside = jnp.tensordot(jnp.tensordot(x, self.a.astype(x.dtype), axes=inputs), self.b.astype(x.dtype), axes=1)
        return multiply(x, self.kernel, inputs) + beside * jnp.asarray(self.scale, x.dtype)

    def dense(self) -> Any:
        """The kernel with what the adapter adds, of one kernel that is no stack."""
        kernel = self.kernel.dense() if isinstance(self.kernel, Kernel) else self.kernel
        added = lora.product(self.a, self.b).astype(jnp.float32) * self.scale
        return (kernel.astype(jnp.float32) + added).astype(self.dtype)

    def __getitem__(self, i: int | Int[Array, ""]) -> "Adapted":
        return dataclasses.replace(self, kernel=self.kernel[i], a=self.a[i], b=self.b[i])

    def stack(self, others: Sequence[Kernel]) -> "Adapted":
        """This one and others of its kind along a new leading axis."""
        all_of = [each for each in (self, *others) if isinstance(each, Adapted)]
        kernels = [each.kernel for each in all_of]
        kernel = kernels[0].stack(kernels[1:]) if isinstance(kernels[0], Kernel) else jnp.stack(kernels)
        a, b = jnp.stack([each.a for each in all_of]), jnp.stack([each.b for each in all_of])
        return dataclasses.replace(self, kernel=kernel, a=a, b=b)


def with_adapters(params: PyTree, adapters: PyTree, *, alpha: int | float) -> dict[str, Any]:
    """Parameters of a decoder whose kernels have adapters beside them: a loss of these trains the adapters.

    Args:
      params: with packed kernels or without, blocks not stacked (`jprune.models.stacked.stack` takes the result).
      adapters: as `lora.init` makes them.
      alpha: the adapters' products are multiplied by alpha / r.

    Raises:
      JpruneError: an adapter of no kernel, or of one of other sizes.
    """
    leaves = flatten(params)
    for path, (a, b) in lora.by_path(adapters).items():
        if path not in leaves:
            raise JpruneError(f"there is an adapter for {path!r} but no such parameter")
        if (shape := (*a.shape[:-1], *b.shape[1:])) != tuple(leaves[path].shape) or a.shape[-1] != b.shape[0]:
            raise JpruneError(f"{path}: the adapter is of a kernel {shape}, this one is {tuple(leaves[path].shape)}")
        leaves[path] = Adapted(leaves[path], a, b, alpha / a.shape[-1])
    return trees.unflatten(leaves)
