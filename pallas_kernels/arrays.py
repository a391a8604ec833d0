"""Steps that packing shares, written once for NumPy and for JAX: `xp` is `numpy` or `jax.numpy`."""

import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._shapes import Bool, Int, Shaped


def namespace(*arrays) -> ModuleType:
    """`numpy` if all arrays (and trees of them) are NumPy's, else `jax.numpy`."""
    return np if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(arrays)) else jnp


def recast(x: Shaped[np.ndarray | jax.Array, "..."], dtype, xp: ModuleType):
    """The same bytes as another dtype; the last axis shrinks or grows."""
    dtype = np.dtype(dtype)
    if xp is np:
        return np.ascontiguousarray(x).view(dtype)
    wider = dtype.itemsize // np.dtype(x.dtype).itemsize
    if wider > 1:
        return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // wider, wider), dtype)
    y = lax.bitcast_convert_type(x, dtype)
    return y.reshape(*x.shape[:-1], math.prod(y.shape[x.ndim - 1 :]))


def unsigned(itemsize: int) -> np.dtype:
    """The unsigned integer of that many bytes."""
    return np.dtype(f"uint{8 * itemsize}")


def to_tiles(matrix: Shaped[np.ndarray | jax.Array, "d_in d_out"], tile: tuple[int, int], xp: ModuleType):
    """`[tiles out, tiles in, outputs, inputs]` of the transpose, padded with zeros to whole tiles."""
    rows, columns = tile
    d_in, d_out = matrix.shape
    matrix = xp.pad(matrix, ((0, -d_in % columns), (0, -d_out % rows)))
    return matrix.reshape(-(-d_in // columns), columns, -(-d_out // rows), rows).transpose(2, 0, 3, 1)


def from_tiles(tiles: Shaped[np.ndarray | jax.Array, "m k rows columns"], shape: tuple[int, int]):
    """The `[d_in, d_out]` kernel of tiles."""
    m, k, rows, columns = tiles.shape
    return tiles.transpose(1, 3, 0, 2).reshape(k * columns, m * rows)[: shape[0], : shape[1]]


def pack_bits(stored: Bool[np.ndarray | jax.Array, "... n"], xp: ModuleType):
    """Int32 words, bit i of a word is element i of its 32."""
    return recast(xp.packbits(stored, axis=-1, bitorder="little"), np.int32, xp)


def unpack_bits(words: Int[np.ndarray | jax.Array, "... n"], xp: ModuleType):
    """The inverse of `pack_bits`."""
    return xp.unpackbits(recast(words, np.uint8, xp), axis=-1, bitorder="little").astype(bool)


def rank(stored: Bool[np.ndarray | jax.Array, "... n"], xp: ModuleType):
    """How many stored elements precede each one on the last axis."""
    counts = xp.cumsum(stored, axis=-1, dtype=np.int16)
    return counts - stored.astype(np.int16)
