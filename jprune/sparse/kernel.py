"""A kernel of the decoder that is packed, and multiplies by `pallas_kernels.matmul`.

On an NVIDIA GPU small batches are multiplied without writing the kernel out, large ones chunk by chunk. Elsewhere each
product unpacks the kernel it needs and drops it, so that memory is that of the packed model and of what runs.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from jprune.annotations import Array, Float, Int
from jprune.errors import JpruneError
from jprune.models.kernels import Kernel
from pallas_kernels import Bitmap, Capped, backends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKernel(Kernel):
    """A packed kernel, or a stack of such, with a leading axis on all arrays.

    Attributes:
      packed: the matrix view of the kernel, packed.
      own: shape of one kernel, `[*d_in, *d_out]`.
      backend: whose kernels multiply by it on a GPU, see `pallas_kernels.matmul`.
    """

    packed: Bitmap | Capped
    own: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    backend: backends.Backend = dataclasses.field(default="pallas", kw_only=True, metadata={"static": True})

    own_axes: ClassVar[int] = 4
    """Axes of the bits of one kernel; those before them number the kernels of a stack."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array it stands for, with the axes of a stack first."""
        return (*self._stack, *self.own)

    @property
    def dtype(self) -> np.dtype:
        """That of the array it stands for."""
        return jnp.dtype(self.packed.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return self.packed.nbytes

    @property
    def kind(self) -> Hashable:
        """Format, shapes, dtypes and backend; how many values a bitmap stores does not matter."""
        packed = self.packed
        return (packed.format, packed.dtype, packed.values, packed.tile, packed.version, self.shape, self.backend)

    @property
    def _stack(self) -> tuple[int, ...]:
        return tuple(self.packed.bits.shape[: -self.own_axes])

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of kernels."""
        return bool(self._stack)

    def multiply(self, x: Float[Array, "..."], inputs: int) -> Float[Array, "..."]:
        """[..., *d_in] x -> [..., *d_out] in x's dtype."""
        flat = x.reshape(*x.shape[: x.ndim - inputs], self.packed.shape[0])
        y = pallas_kernels.matmul(flat, self.packed, backend=self.backend)
        return y.reshape(*flat.shape[:-1], *self.own[inputs:])

    def dense(self) -> Any:
        """The array it stands for: NumPy's if its own are NumPy's, else JAX's."""
        if not self._stack:
            return self.whole()
        kernels = [self[i].dense() for i in range(self._stack[0])]
        return np.stack(kernels) if isinstance(kernels[0], np.ndarray) else jnp.stack(kernels)

    def whole(self) -> Any:
        """The array that one kernel stands for."""
        return pallas_kernels.unpack(self.packed).reshape(self.own)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, as plain arrays by name, with a header."""
        return pallas_kernels.to_arrays(self.packed)

    def __getitem__(self, i: int | Int[Array, ""]) -> "PackedKernel":
        return jax.tree.map(lambda leaf: leaf[i], self)

    def stack(self, others: Sequence[Kernel]) -> "PackedKernel":
        """This one and others of its kind along a new leading axis; bitmaps are filled up to the longest."""
        kernels = [kernel for kernel in (self, *others) if isinstance(kernel, PackedKernel)]
        longest = max(kernel.words for kernel in kernels)
        filled = [kernel.with_room(longest) for kernel in kernels]
        return jax.tree.map(_stacked, *filled)

    @property
    def words(self) -> int:
        """Words of the values of a bitmap, on which the shapes of a compiled program depend; else 0."""
        return self.packed.words.shape[-1] if isinstance(self.packed, Bitmap) else 0

    def with_room(self, words: int) -> "PackedKernel":
        """The same kernel with at least that many words, so that programs serve several kernels."""
        if not isinstance(self.packed, Bitmap) or (lack := words - self.words) <= 0:
            return self
        pad: Callable = np.pad if isinstance(self.packed.words, np.ndarray) else jnp.pad
        wide = pad(self.packed.words, [(0, 0)] * (self.packed.words.ndim - 1) + [(0, lack)])
        return dataclasses.replace(self, packed=dataclasses.replace(self.packed, words=wide))


def on_backend(params: Any, backend: backends.Backend) -> Any:
    """The same parameters, with packed kernels by which a GPU multiplies with the kernels of a backend.

    Args:
      params: with packed kernels, or without.
      backend: see `pallas_kernels.matmul`.

    Raises:
      JpruneError: there is no such backend, or its packages are missing here.
    """
    try:
        backends.load(backend)
    except pallas_kernels.FormatError as error:
        raise JpruneError(str(error)) from error

    def moved(leaf: Any) -> Any:
        return dataclasses.replace(leaf, backend=backend) if isinstance(leaf, PackedKernel) else leaf

    return jax.tree.map(moved, params, is_leaf=lambda node: isinstance(node, PackedKernel))


def runs_as(*, unpacked: bool) -> str:
    """What becomes of packed kernels where the decoder runs on this machine: a line for the user."""
    if unpacked:
        return "packed kernels were unpacked once: memory is that of the dense model"
    if jax.default_backend() == "gpu":
        return "kernels stay packed, and the GPU multiplies by them as they are"
    return (
        "kernels stay packed, and each is unpacked whenever it is needed, at every token: memory is that of the "
        "packed model, and it takes longer; `unpack` unpacks all once"
    )


def _stacked(*leaves: Any) -> Any:
    return np.stack(leaves) if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack(leaves)


def rooms(words: Mapping[str, int]) -> dict[str, int]:
    """How many words each kernel is given, so that few programs serve all layers: at most a twentieth too many.

    Args:
      words: that it has, by path; those of the same name in other blocks may share a program.
    """
    alike: dict[str, list[str]] = {}
    for path in words:
        alike.setdefault(re.sub(r"^blocks/\d+", "", path), []).append(path)
    room: dict[str, int] = {}
    for paths in alike.values():
        longest = 0
        for path in sorted(paths, key=lambda path: -words[path]):
            longest = longest if words[path] <= longest <= 1.05 * words[path] else words[path]
            room[path] = longest
    return room
