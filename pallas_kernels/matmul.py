"""`matmul`: x times a packed kernel, by the kernels on NVIDIA GPUs and by the reference elsewhere.

Three ways, by the batch (all leading axes of x together):
- up to `tiles.decode_above()`: a program decodes its tile in registers and multiplies, 64 rows of x at a time;
- above: a chunk of outputs is decoded to dense, multiplied by XLA's matmul and dropped, then the next;
- `TiledCSL` always the second way: it needs writes to shared memory in any order, which Pallas cannot do.

Products are summed in float32. Operands are multiplied in the stored values' dtype if x has it too, or if the values
have 8 bits and x 16; else in float32. Results do not vary between runs, but float32 sums are taken in another order for
another device or batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import backends, reference, tiles
from pallas_kernels._shapes import Array, Shaped
from pallas_kernels.arrays import to_tiles
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import FLOATS, Packed, TiledCSL
from pallas_kernels.packing import check_version, with_values

DENSE_BYTES = 2**26
"""Of a chunk of outputs that is decoded to dense at a time; a chunk is at least one row of tiles."""


def matmul(
    x: Shaped[Array | np.ndarray, "... d_in"],
    packed: Packed,
    *,
    values: Shaped[Array, "..."] | None = None,
    backend: backends.Backend = "pallas",
    interpret: bool = False,
) -> Shaped[Array, "... d_out"]:
    """x @ kernel, of a kernel that `pack` packed.

    Differentiable in x, in `values` and in the scales of quantised values; works under `jit`, `vmap` and `shard_map`
    (see `matmul_shards`). The gradient of the values takes the memory of one dense float32 kernel.

    Args:
      x: `[..., d_in]`, bfloat16, float16 or float32.
      packed: of the same d_in.
      values: to be multiplied instead of the stored ones, in the form of `values(packed)`: the way to train them.
      backend: whose kernels run on a GPU: "pallas", or "triton", which needs jax-triton.
      interpret: run the GPU's kernels step by step in the backend's interpreter, wherever this runs: for tests.
        Triton's asks for TRITON_INTERPRET=1 in the environment.

    Returns:
      `[..., d_out]` of x's dtype.

    Raises:
      FormatError: wrong dtype or d_in; packed data of a newer version; a backend that cannot run here.
    """
    check_version(packed)
    d_in, d_out = packed.shape
    if np.dtype(x.dtype).name not in FLOATS:
        raise FormatError(f"x is {', '.join(FLOATS)}; got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != d_in:
        raise FormatError(f"x is [..., {d_in}] for {packed!r}; got shape {tuple(x.shape)}")
    if values is not None and packed.scale is not None:
        raise FormatError(f"{packed!r} has quantised values, which cannot be trained: pack without values=")
    way = Way(backend, interpret)
    backends.load(backend, interpret=interpret)
    rows = jnp.asarray(x).reshape(-1, d_in)
    if rows.shape[0] == 0:
        return jnp.zeros((*x.shape[:-1], d_out), x.dtype)
    return _matmul(way, rows, values, packed).reshape(*x.shape[:-1], d_out)


@dataclasses.dataclass(frozen=True)
class Way:
    """Whose kernels run, and whether on a GPU or in their interpreter."""

    backend: str
    interpret: bool

    @property
    def kernels(self):
        """The backend's module."""
        return backends.load(self.backend, interpret=self.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(way, x, values, packed):
    if values is not None:
        packed = with_values(packed, values)
    return _multiplier(way)(x, packed)


def _matmul_forward(way, x, values, packed):
    if values is not None:
        packed = with_values(packed, values)
    y = _multiplier(way)(x, packed)
    return y, (x, values is not None, packed, y if packed.scale is not None else None)


def _matmul_backward(way, residuals, dy):
    x, trained, packed, y = residuals
    scaled = dy.astype(jnp.float32)
    if packed.scale is not None:
        scaled = scaled * packed.scale[None, :]
    dtype = tiles.dot_dtype(packed, x.dtype)
    dx = jnp.zeros(x.shape, jnp.float32)
    for first, last, dense in _dense_chunks(packed, dtype, way):
        part = scaled[:, first:last].astype(dtype)
        dx += _dot(part, dense[: last - first, : x.shape[1]], 1, 0)
    dvalues = None
    if trained:
        dkernel = _dot(x.astype(jnp.float32), dy.astype(jnp.float32), 0, 0)
        module = reference.module(packed)
        kept = jax.eval_shape(lambda p: module.values(p, jnp), packed)
        dvalues = module.collect(packed, to_tiles(dkernel.astype(kept.dtype), packed.tile, jnp), jnp)
    # Integers have no gradient, which JAX writes as float0.
    dpacked = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), packed)
    if packed.scale is not None:
        products = dy.astype(jnp.float32) * y.astype(jnp.float32)
        dpacked = dataclasses.replace(dpacked, scale=products.sum(0) / packed.scale)
    return dx.astype(x.dtype), dvalues, dpacked


def _dot(a, b, a_axis, b_axis):
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.cache
def _multiplier(way: Way):
    """x `[n, d_in]`, packed -> y `[n, d_out]`, with a batching rule: rows of x are rows of x, whoever batches them."""

    @jax.custom_batching.custom_vmap
    def multiply(x, packed):
        if isinstance(packed, TiledCSL) or x.shape[0] > tiles.decode_above():
            return _multiply_dense(x, packed, way)
        return _multiply_packed(x, packed, way)

    @multiply.def_vmap
    def rule(size, batched, x, packed):
        x_batched, packed_batched = batched
        if not any(jax.tree.leaves(packed_batched)):
            return multiply(x.reshape(-1, x.shape[-1]), packed).reshape(*x.shape[:-1], -1), True

        def one(i):
            def pick(leaf, is_batched):
                return leaf[i] if is_batched else leaf

            return multiply(pick(x, x_batched), jax.tree.map(pick, packed, packed_batched))

        return lax.map(one, jnp.arange(size)), True

    return multiply


def _multiply_packed(x, packed, way):
    tile = tiles.choose_tile(packed, x.shape[0], way.backend)

    def on_gpu(x, packed):
        return _finish(way.kernels.multiply(x, packed, tile, interpret=way.interpret), packed, x.dtype)

    def elsewhere(x, packed):
        return _finish(reference.multiply(x, packed, tiles.dot_dtype(packed, x.dtype)), packed, x.dtype)

    if way.interpret:
        return on_gpu(x, packed)
    return lax.platform_dependent(x, packed, cuda=on_gpu, default=elsewhere)


def _finish(partial, packed, dtype):
    """Sums shares in order, drops padding, scales."""
    y = partial.sum(0)[:, : packed.shape[1]]
    if packed.scale is not None:
        y = y * packed.scale[None, :]
    return y.astype(dtype)


def _dense_chunks(packed, dtype, way):
    """(first output, last, `[outputs, d_in padded]`) of chunks of the transposed kernel's stored values."""
    rows, columns = packed.tile[0], packed.grid[1] * packed.tile[1]
    many = packed.grid[0]
    if not isinstance(packed, TiledCSL):
        many = max(1, DENSE_BYTES // (rows * columns * jnp.dtype(dtype).itemsize))
    for start in range(0, packed.grid[0], many):
        stop = min(start + many, packed.grid[0])
        yield start * rows, min(stop * rows, packed.shape[1]), _dense_rows(packed, start, stop, dtype, way)


def _dense_rows(packed, start, stop, dtype, way):
    stored = tiles.tile_dtype(packed, dtype)

    def on_gpu(packed):
        tile = dataclasses.replace(tiles.choose_tile(packed, 1, way.backend), split=1)
        return way.kernels.dense_rows(packed, start, stop, tile, stored, interpret=way.interpret).astype(dtype)

    def elsewhere(packed):
        return reference.dense_rows(packed, start, stop, dtype)

    if isinstance(packed, TiledCSL):
        return elsewhere(packed)
    if way.interpret:
        return on_gpu(packed)
    return lax.platform_dependent(packed, cuda=on_gpu, default=elsewhere)


def _multiply_dense(x, packed, way):
    dtype = tiles.dot_dtype(packed, x.dtype)
    parts = []
    for first, last, dense in _dense_chunks(packed, dtype, way):
        part = _dot(x.astype(dtype), dense[: last - first, : x.shape[1]], 1, 1)
        if packed.scale is not None:
            part = part * packed.scale[None, first:last]
        parts.append(part.astype(x.dtype))
    return jnp.concatenate(parts, axis=1)


_differentiable.defvjp(_matmul_forward, _matmul_backward)
_matmul = jax.jit(_differentiable, static_argnums=0)
