"""The kernels' results in plain jnp: for correctness on CPU and TPU, and not for speed.

Unpacks to dense and multiplies, so it is slower than a dense matmul and saves no memory while it runs. Where no kernel
runs, unpack once after loading and keep the dense weights.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels import bitmap, capped
from pallas_kernels._shapes import Array, Float
from pallas_kernels.formats import Bitmap, Capped, Packed


def multiply(x: Float[Array, "n d_in"], packed: Packed, dtype) -> Float[Array, "1 n d_out"]:
    """x @ stored values (not scaled), float32; as `_pallas.multiply`, with one share and no padding.

    Args:
      x: rows to multiply.
      packed: any format.
      dtype: of the operands.
    """
    dense = module(packed).unpack(packed, jnp)
    product = lax.dot_general(
        x.astype(dtype),
        dense.astype(dtype),
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product[None]


def dense_rows(packed: Packed, first: int, last: int, dtype) -> Float[Array, "outputs d_in_padded"]:
    """As `_pallas.dense_rows`."""
    if isinstance(packed, Capped):
        planes = tuple(p[first:last] for p in packed.planes)
        packed = dataclasses.replace(packed, bits=packed.bits[first:last], planes=planes)
    elif isinstance(packed, Bitmap):
        sliced = {name: getattr(packed, name)[first:last] for name in ("bits", "tiles", "rows")}
        packed = dataclasses.replace(packed, **sliced)
    tiles = module(packed).expand(packed, module(packed).values(packed, jnp), jnp)
    if not isinstance(packed, Capped | Bitmap):
        tiles = tiles[first:last]
    m, k, rows, columns = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(m * rows, k * columns).astype(dtype)


def module(packed: Packed):
    """Where a format's packing lives."""
    return capped if isinstance(packed, Capped) else bitmap
