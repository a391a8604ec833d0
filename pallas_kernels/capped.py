"""`Capped`: packing and unpacking. Slots of a group of 8 inputs are its values in the order of the inputs."""

import dataclasses
from types import ModuleType

import numpy as np

from pallas_kernels.arrays import from_tiles, pack_bits, rank, recast, to_tiles, unpack_bits, unsigned
from pallas_kernels.formats import GROUP, Capped, dtype_of, plane_bytes


def pack(matrix, mask, *, capacity: int, xp: ModuleType, **meta) -> Capped:
    """Packs `matrix` (already of the values' dtype) where `mask`; groups over the capacity lose their last values.

    NumPy packs one row of tiles at a time, so that no more than that exists twice.
    """
    if xp is np:
        rows = meta["tile"][0]
        parts = [
            _pack(matrix[:, i : i + rows], mask[:, i : i + rows], capacity, meta["tile"], xp)
            for i in range(0, matrix.shape[1], rows)
        ]
        bits, planes = np.concatenate([b for b, _ in parts]), [np.concatenate(p) for p in zip(*(p for _, p in parts))]
    else:
        bits, planes = _pack(matrix, mask, capacity, meta["tile"], xp)
    return Capped(bits=bits, planes=tuple(planes), capacity=capacity, **meta)


def _pack(matrix, mask, capacity, tile, xp):
    stored = to_tiles(mask, tile, xp)
    return pack_bits(stored, xp), _planes(_collect(to_tiles(matrix, tile, xp), stored, capacity, xp), xp)


def _collect(tiles, stored, capacity: int, xp: ModuleType):
    """The slots `[m, k, outputs, groups, C]` of dense tiles; zero where a group has fewer."""
    groups = stored.reshape(*stored.shape[:-1], -1, GROUP)
    values = tiles.reshape(groups.shape)
    place = rank(groups, xp)
    # Sums of bit patterns and zeros: exact for every dtype, and NumPy has no sums of bfloat16 and float8.
    bits = recast(values, unsigned(np.dtype(values.dtype).itemsize), xp)
    zero = bits.dtype.type(0)
    picked = [xp.where(groups & (place == c), bits, zero).sum(-1, dtype=bits.dtype) for c in range(capacity)]
    return recast(xp.stack(picked, -1), values.dtype, xp)


def _planes(slots, xp: ModuleType) -> tuple:
    """The slots' bytes in planes of 4, 2 and 1."""
    itemsize = np.dtype(slots.dtype).itemsize
    raw = recast(slots, np.uint8, xp)
    planes, start = [], 0
    for size in plane_bytes(slots.shape[-1], itemsize):
        planes.append(
            recast(raw[..., start : start + size], f"int{8 * size}", xp)[..., 0]
            if size > 1
            else recast(raw[..., start], np.int8, xp)
        )
        start += size
    return tuple(planes)


def stored(packed: Capped, xp: ModuleType):
    """Bool tiles: what is stored."""
    return unpack_bits(packed.bits, xp)


def values(packed: Capped, xp: ModuleType):
    """The slots `[m, k, outputs, groups, C]`, in the values' dtype."""
    raw = [recast(p[..., None], np.uint8, xp) for p in packed.planes]
    return recast(xp.concatenate(raw, -1), dtype_of(packed.values), xp)


def with_values(packed: Capped, slots, xp: ModuleType) -> Capped:
    """The same places, other values."""
    return dataclasses.replace(packed, planes=_planes(slots, xp))


def collect(packed: Capped, tiles, xp: ModuleType):
    """The slots of dense tiles at the stored places, in the tiles' dtype."""
    return _collect(tiles, stored(packed, xp), packed.capacity, xp)


def expand(packed: Capped, slots, xp: ModuleType):
    """Dense tiles from slots; the inverse of `collect`."""
    groups = stored(packed, xp).reshape(*slots.shape[:-1], GROUP)
    place = xp.minimum(rank(groups, xp), np.int16(packed.capacity - 1))
    dense = xp.take_along_axis(slots, place.astype(np.int32), axis=-1)
    dense = xp.where(groups, dense, slots.dtype.type(0))
    return dense.reshape(*packed.bits.shape[:3], packed.tile[1])


def unpack(packed: Capped, xp: ModuleType):
    """The stored values, dense `[d_in, d_out]`, not scaled."""
    return from_tiles(expand(packed, values(packed, xp), xp), packed.shape)
