"""`pack` and `unpack`, `values` and `with_values`: between a dense kernel and any of the formats.

NumPy arrays are packed by NumPy, JAX arrays by jitted JAX, with the same result. Unpacking gives back what was packed
exactly; quantised values give back what they stand for (value times its output's scale).
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bitmap, capped
from pallas_kernels._shapes import Bool, Float, Shaped
from pallas_kernels.arrays import namespace
from pallas_kernels.demand import check, count_tiles, holds
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import FLOATS, QUANTISED, TILES, VERSION, Bitmap, Capped, Packed, dtype_of, parse

Any2D = Shaped[np.ndarray | jax.Array, "..."]
"""`pack` checks rank and dtype itself, in words for its user."""
_CHECKED = -1
"""In place of a traced mask's capacity: the mask was seen and fits."""


def pack(
    kernel: Any2D,
    format: str,
    *,
    mask: Any2D | None = None,
    values: str | None = None,
    capacity: int | None = None,
) -> Packed:
    """Packs a sparse kernel.

    Args:
      kernel: `[d_in, d_out]`, bfloat16, float16 or float32; NumPy or JAX, concrete or traced.
      format: "capped:1" to "capped:4", "bitmap" or "tiled_csl".
      mask: what to store, True = keep, zeros there included; what is not zero if None.
      values: dtype of the stored values: the kernel's if None, "int8" or "float8_e4m3fn" with a scale an output.
      capacity: for "bitmap" and "tiled_csl" under `jax.jit` only: the most values the kernel may store.

    Returns:
      The packed kernel, of NumPy arrays for a NumPy kernel.

    Raises:
      FormatError: unknown format; wrong rank or dtype; the mask does not fit (names the first tile, and formats that
        would hold it). A traced mask cannot be looked at: one that does not fit gives NaN instead.
    """
    parsed = parse(format)
    _check_kernel(kernel, mask, values, parsed.name)
    dtype = np.dtype(kernel.dtype).name
    xp = namespace(kernel, mask)
    traced = any(isinstance(x, jax.core.Tracer) for x in (kernel, mask))
    values, tile = values or dtype, TILES[parsed.name]
    meta = {"shape": tuple(kernel.shape), "dtype": dtype, "values": values, "tile": tile}
    if mask is None:
        mask = kernel != 0
    if not traced:
        check(mask, parsed)
    length = None
    if parsed.name != "capped":
        itemsize = dtype_of(values).itemsize
        if traced and capacity is None:
            raise FormatError(f"{format} under jax.jit needs capacity=, the most values the kernel may store")
        if traced:
            length = bitmap.stream_length(parsed.name, _tiles(kernel.shape, tile), itemsize, capacity or 0)
        else:
            length = bitmap.stream_length(parsed.name, count_tiles(mask, parsed), itemsize)
        if length >= 2**31:
            raise FormatError(f"{format} indexes values with 32 bits; {length} values need the kernel cut into parts")
    function = _pack if xp is np else _pack_jit
    return function(kernel, mask, parsed, tuple(meta.items()), length, capacity if traced else _CHECKED, xp)


def _check_kernel(kernel, mask, values, name) -> None:
    if kernel.ndim != 2 or 0 in kernel.shape:
        raise FormatError(f"a kernel is [d_in, d_out], neither empty; got shape {tuple(kernel.shape)}")
    dtype = np.dtype(kernel.dtype).name
    if dtype not in FLOATS:
        raise FormatError(f"a kernel's dtype is {', '.join(FLOATS)}; got {dtype}")
    if mask is not None and (mask.shape != kernel.shape or np.dtype(mask.dtype) != np.dtype(bool)):
        raise FormatError(
            f"the mask must be bool {list(kernel.shape)} as the kernel; got {mask.dtype}{list(mask.shape)}"
        )
    if values is not None and values not in (*QUANTISED, dtype):
        raise FormatError(f"values is {dtype}, the kernel's dtype, {' or '.join(QUANTISED)}; got {values!r}")
    if name == "tiled_csl" and dtype_of(values or dtype).itemsize != 2:
        raise FormatError(f"tiled_csl has 16 bits for a value; {values or dtype} has not: use bitmap")


def _tiles(shape, tile) -> int:
    return -(-shape[1] // tile[0]) * -(-shape[0] // tile[1])


def _pack(kernel, mask, parsed, meta, length, capacity, xp: ModuleType) -> Packed:
    options: dict[str, Any] = dict(meta)
    matrix, scale = kernel, None
    if options["values"] in QUANTISED:
        matrix, scale = quantise(kernel, mask, options["values"], xp)
    if parsed.name == "capped":
        packed: Packed = capped.pack(matrix, mask, capacity=parsed.capacity, xp=xp, scale=scale, **options)
    else:
        packed = bitmap.pack(parsed.name, matrix, mask, length=length, xp=xp, scale=scale, **options)
    return packed if capacity == _CHECKED else _poisoned(packed, mask, parsed, capacity)


def _poisoned(packed: Packed, mask, parsed, capacity) -> Packed:
    """NaN everywhere if the traced mask turns out not to fit."""
    fits = holds(mask, parsed)
    if parsed.name != "capped":
        fits &= mask.sum(dtype=np.int32) <= np.int32(capacity)
    if isinstance(packed, Bitmap):  # a kernel goes where these point without asking
        tiles, rows = jnp.where(fits, packed.tiles, np.int32(0)), jnp.where(fits, packed.rows, np.int16(0))
        packed = dataclasses.replace(packed, tiles=tiles, rows=rows)
    if packed.scale is not None:
        return dataclasses.replace(packed, scale=jnp.where(fits, packed.scale, np.float32(np.nan)))
    module = _module(packed)
    stored = module.values(packed, jnp)
    return module.with_values(packed, jnp.where(fits, stored, stored.dtype.type(np.nan)), jnp)


_pack_jit = jax.jit(_pack, static_argnums=(2, 3, 4, 5, 6))


def quantise(
    kernel: Float[np.ndarray | jax.Array, "d_in d_out"],
    mask: Bool[np.ndarray | jax.Array, "d_in d_out"],
    values: str,
    xp: ModuleType,
):
    """Values of the small dtype and their scale `[d_out]`: the largest stored magnitude of an output is representable.

    Rounds to nearest, ties to even. An output of zeros has scale 1.
    """
    most = np.float32(QUANTISED[values])
    inverse = np.float32(1) / most  # XLA may multiply by reciprocals where it can; NumPy shall round the same way
    wide = xp.where(mask, kernel.astype(np.float32), np.float32(0))
    largest = xp.max(xp.abs(wide), axis=0)
    scale = xp.where(largest > 0, largest * inverse, np.float32(1))
    scaled = xp.clip(wide * (np.float32(1) / scale)[None, :], -most, most)
    if values == "int8":
        scaled = xp.round(scaled)
    return scaled.astype(dtype_of(values)), scale


def check_version(packed: Packed) -> None:
    """Raises a FormatError for packed data of a newer version."""
    if packed.version > VERSION:
        raise FormatError(
            f"packed data of version {packed.version}, newer than {VERSION}, the newest known here: update jprune"
        )


def _module(packed: Packed):
    check_version(packed)
    return capped if isinstance(packed, Capped) else bitmap


def unpack(packed: Packed) -> Shaped[np.ndarray | jax.Array, "d_in d_out"]:
    """The dense kernel in its own dtype: NumPy if the packed arrays are NumPy's, else JAX."""
    module, xp = _module(packed), namespace(packed)
    if xp is jnp:
        return _unpack_jit(packed)
    return _unpack(packed, module, xp)


def _unpack(packed, module, xp):
    dense = module.unpack(packed, xp)
    if packed.scale is not None:
        dense = dense.astype(np.float32) * packed.scale[None, :]
    return dense.astype(dtype_of(packed.dtype))


@jax.jit
def _unpack_jit(packed):
    return _unpack(packed, _module(packed), jnp)


def values(packed: Packed) -> Shaped[np.ndarray | jax.Array, "..."]:
    """The stored values in the packed order, to be trained: `[..., C]` slots, or one stream; see `with_values`.

    Slots and places of the stream that no element of the mask has are zero and stay without a gradient.
    """
    return _module(packed).values(packed, namespace(packed))


def with_values(packed: Packed, new: Shaped[np.ndarray | jax.Array, "..."]) -> Packed:
    """The same mask with other values, of the shape and dtype of `values(packed)`; scales stay."""
    module, xp = _module(packed), namespace(packed, new)
    old = jax.eval_shape(lambda p: module.values(p, jnp), packed)
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise FormatError(f"values of {packed!r} are {old.dtype}{list(old.shape)}; got {new.dtype}{list(new.shape)}")
    return module.with_values(packed, new, xp)
