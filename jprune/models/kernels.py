"""Where the decoder multiplies by a kernel: an array, or something else that says how it is multiplied by.

What stores a kernel in another form (`jprune.sparse`) is a `Kernel`; the decoder knows no form but this one.
"""

import abc
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import trees
from jprune.annotations import Array, Float, Int


class Kernel(abc.ABC):
    """A kernel that is no array: a pytree with shape and dtype, which multiplies, unpacks and stacks itself."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """That of the array it stands for, with the axes of a stack first."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """That of the array it stands for."""

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """Equal for those that `stack` puts together."""

    @abc.abstractmethod
    def multiply(self, x: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
        """[..., *d_in] x -> [..., *d_out] in x's dtype, of a kernel that is no stack; it has `inputs` input axes."""

    @abc.abstractmethod
    def dense(self) -> Any:
        """The array it stands for: NumPy's if its own are NumPy's, else JAX's."""

    @abc.abstractmethod
    def __getitem__(self, i: int | Int[Array, ""]) -> "Kernel":
        """One kernel of a stack; its number may be known to the compiled program only."""

    @abc.abstractmethod
    def stack(self, others: "Sequence[Kernel]") -> "Kernel":
        """This one and others of its kind along a new leading axis."""


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, as `trees.flatten` gives them, but that kernels are leaves whatever they store."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Kernel))
    return {trees.path_name(path): leaf for path, leaf in found if trees.is_array(leaf)}


def multiply(x: Float[Array, "..."], kernel: Array | np.ndarray | Kernel, inputs: int = 1) -> Float[Array, "..."]:
    """The last `inputs` axes of x against the first of the kernel, in x's dtype."""
    if isinstance(kernel, Kernel):
        return kernel.multiply(x, inputs)
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=inputs)


def multiply_each(x: Float[Array, "E B T d_in"], kernels: Array | np.ndarray | Kernel) -> Float[Array, "E B T d_out"]:
    """Every kernel of a stack against its own inputs: of arrays, in one dot_general."""
    if isinstance(kernels, Kernel):
        return jax.vmap(lambda each, kernel: kernel.multiply(each, 1))(x, kernels)
    return jax.lax.dot_general(x, kernels.astype(x.dtype), (((3,), (1,)), ((0,), (0,))))
