"""The backend "pallas" (Triton lowering, NVIDIA GPUs): decode a tile in registers, multiply on tensor cores.

One program multiplies `rows` outputs by the batch over its share of the inputs, tile by tile, and writes float32
partial sums; the shares are added up by XLA, in one order, so results are the same in every run. Weights are the left
operand: the tensor cores' long side is then the outputs, and a batch of 1 costs what one of 16 does.

Triton in Pallas is deprecated since jax 0.11, which warns when it lowers a kernel, and still the only way to write
these loads in plain Pallas. What depends on it is in this module, in `ptx` and in `sweep`.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import decode, ptx, words
from pallas_kernels._shapes import Array, Float
from pallas_kernels.formats import Bitmap, Capped, Packed
from pallas_kernels.tiles import Tile, block_of, dot_dtype, share_of, tile_dtype


class _Reader:
    """Reads and decodes tiles of one row of tiles inside a kernel."""

    def __init__(self, packed: Packed, refs, rows: int, dtype, w: ModuleType):
        """`rows` outputs of each tile are read; `packed` is only asked for its shapes."""
        self.packed, self.refs, self.rows, self.dtype, self.w = packed, refs, rows, dtype, w
        self.columns = packed.tile[1]
        parts = packed.tile[0] // rows
        m = pl.program_id(0)
        self.row_of_tiles, self.here = m // parts, pl.ds(m % parts * rows, rows)

    def ahead(self, k) -> tuple:
        """What has to be known of tile `k` before its values can be asked for; loaded one step early."""
        return ()

    def read(self, k, ahead) -> jax.Array:
        """Tile `k`, dense `[rows, columns]`."""
        raise NotImplementedError


class _CappedReader(_Reader):
    def read(self, k, ahead):
        bits_ref, *plane_refs = self.refs
        at = (self.row_of_tiles, k, self.here, slice(None))
        bits = plt.load(bits_ref.at[at])
        planes = [plt.load(ref.at[at]).astype(jnp.int32) for ref in plane_refs]
        shape = (*bits.shape, 4)
        byte = lax.shift_right_logical(
            jnp.broadcast_to(bits[:, :, None], shape), lax.broadcasted_iota(jnp.int32, shape, 2) * 8
        )
        byte = byte.reshape(self.rows, self.columns // 8) & 0xFF
        group = decode.capped_group(byte, planes, self.packed.values, self.dtype, self.w)
        return decode.interleave(group).reshape(self.rows, self.columns)


class _BitmapReader(_Reader):
    def ahead(self, k):
        tiles_ref, rows_ref, bits_ref, _ = self.refs
        return (
            tiles_ref[self.row_of_tiles, k],
            plt.load(rows_ref.at[self.row_of_tiles, k, self.here]).astype(jnp.int32),
            plt.load(bits_ref.at[self.row_of_tiles, k, self.here, slice(None)]),
        )

    def read(self, k, ahead):
        begin, rows, bits = ahead
        words_ref = self.refs[-1]
        counts = lax.population_count(bits)
        start = (begin + rows)[:, None] + (jnp.cumsum(counts, axis=1) - counts)
        shape = (*bits.shape, 8)
        bits = jnp.broadcast_to(bits[:, :, None], shape)
        place = lax.broadcasted_iota(jnp.int32, shape, 2) * 4
        below = (jnp.int32(1) << place) - 1
        first = start[:, :, None] + lax.population_count(bits & below)
        nibble = lax.shift_right_logical(bits, place) & 15
        size = self.packed.itemsize
        if size == 4:
            elements, index = [], first
            for j in range(4):
                bit = (nibble >> j) & 1
                value = plt.load(words_ref.at[index])
                elements.append(lax.bitcast_convert_type(jnp.where(bit != 0, value, 0), jnp.float32))
                index = index + bit
        else:
            # Cleared upper bits tell the compiler that + 1 and + 2 do not overflow: they become part of the loads.
            word = self.w.shift_right(first, size % 2 + 1) & (0x3FFFFFFF if size == 2 else 0x1FFFFFFF)
            loaded = [plt.load(words_ref.at[word + j]) for j in range(3 if size == 2 else 2)]
            elements = decode.bitmap_quad(nibble, loaded, first, self.packed.values, self.dtype, self.w)
        return decode.interleave(elements).reshape(self.rows, self.columns)


def _inputs(packed: Packed) -> tuple[type[_Reader], tuple]:
    """The arrays that a kernel reads of a packed kernel, and what reads them."""
    if isinstance(packed, Capped):
        return _CappedReader, (packed.bits, *packed.planes)
    if isinstance(packed, Bitmap):
        return _BitmapReader, (packed.tiles, packed.rows, packed.bits, packed.words)
    raise TypeError(f"no kernel reads {packed.name}")


def _multiply_kernel(*refs, make: Callable[..., _Reader], tile: Tile, steps: int, n: int, block: int, dot):
    *packed_refs, x_ref, out_ref = refs
    reader = make(packed_refs)
    columns = reader.columns
    share, batch = pl.program_id(1), pl.program_id(2)
    begin, count = share_of(share, steps, tile.split)
    rows = batch * block + lax.broadcasted_iota(jnp.int32, (block, columns), 0)
    inputs = lax.broadcasted_iota(jnp.int32, (block, columns), 1)
    # Rows past the batch read its last one again; what comes of them is not written.
    known = jnp.minimum(rows, n - 1)

    def body(i, carry):
        ahead, total = carry
        k = begin + i
        following = reader.ahead(jnp.minimum(k + 1, steps - 1))
        weights = reader.read(k, ahead)
        x = plt.load(x_ref.at[known, inputs + k * columns])
        product = plt.dot(weights.astype(dot), x.astype(dot), trans_b=True, precision=lax.Precision.HIGHEST)
        return following, total + product.astype(jnp.float32)

    start = jnp.zeros((tile.rows, block), jnp.float32)
    _, total = lax.fori_loop(0, count, body, (reader.ahead(begin), start))
    out_rows = lax.broadcasted_iota(jnp.int32, total.shape, 0) + pl.program_id(0) * tile.rows
    out_columns = lax.broadcasted_iota(jnp.int32, total.shape, 1) + batch * block
    plt.store(out_ref.at[share, out_columns, out_rows], total.astype(out_ref.dtype), mask=out_columns < n)


def multiply(
    x: Float[Array, "n d_in"], packed: Packed, tile: Tile, *, interpret: bool = False
) -> Float[Array, "split n d_out_padded"]:
    """Partial sums of x @ stored values (not scaled), float32; d_out padded to whole tiles. n is at least 1."""
    reader, arrays = _inputs(packed)
    dtype = tile_dtype(packed, x.dtype)
    steps = packed.grid[1]
    x = jnp.pad(x, ((0, 0), (0, steps * packed.tile[1] - x.shape[1])))
    n = x.shape[0]
    block = block_of(n)
    d_out = packed.grid[0] * packed.tile[0]
    make = functools.partial(reader, packed, rows=tile.rows, dtype=dtype, w=words if interpret else ptx)
    kernel = functools.partial(
        _multiply_kernel,
        make=make,
        tile=tile,
        steps=steps,
        n=n,
        block=block,
        dot=dot_dtype(packed, x.dtype),
    )
    grid = (d_out // tile.rows, tile.split, -(-n // block))
    out = jax.ShapeDtypeStruct((tile.split, n, d_out), jnp.float32)
    return _call(kernel, grid, out, tile, interpret, f"{packed.name}_multiply")(*arrays, x)


def _dense_kernel(*refs, make: Callable[..., _Reader], first: int, rows: int):
    *packed_refs, out_ref = refs
    reader = make(packed_refs)
    reader.row_of_tiles += first
    k = pl.program_id(1)
    weights = reader.read(k, reader.ahead(k))
    out_ref[pl.ds(pl.program_id(0) * rows, rows), pl.ds(k * reader.columns, reader.columns)] = weights


def dense_rows(
    packed: Packed, first: int, last: int, tile: Tile, dtype, *, interpret: bool = False
) -> Float[Array, "outputs d_in_padded"]:
    """Rows `first` to `last` (exclusive) of tiles, decoded to the transposed kernel's stored values, not scaled."""
    reader, arrays = _inputs(packed)
    make = functools.partial(reader, packed, rows=tile.rows, dtype=dtype, w=words if interpret else ptx)
    outputs, columns = (last - first) * packed.tile[0], packed.grid[1] * packed.tile[1]
    kernel = functools.partial(_dense_kernel, make=make, first=first, rows=tile.rows)
    grid = (outputs // tile.rows, packed.grid[1])
    out = jax.ShapeDtypeStruct((outputs, columns), dtype)
    return _call(kernel, grid, out, tile, interpret, f"{packed.name}_dense")(*arrays)


def _call(kernel, grid, out, tile: Tile, interpret: bool, name: str) -> Callable[..., Any]:
    """A pallas_call whose arguments are whole arrays: kernels find their tiles themselves."""

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *ids: (0,) * len(x.shape))

    def run(*arrays):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[whole(x) for x in arrays],
            out_specs=whole(out),
            out_shape=out,
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name=name,
        )(*arrays)

    return run
