"""`Bitmap` and `TiledCSL`: packing and unpacking. Both keep the values of a tile side by side, output by output.

How many words the values take depends on the mask, and a compiled program needs to know it, so packing under `jax.jit`
takes a `capacity` in stored values, to which the tiles' alignment is added.
"""

import dataclasses
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from pallas_kernels.arrays import from_tiles, pack_bits, rank, recast, to_tiles, unpack_bits, unsigned
from pallas_kernels.formats import TILES, Bitmap, Packed, TiledCSL, dtype_of

SPARE = 16
"""Bytes after the last value, which a kernel may read but not use."""
_NOWHERE = 0xFFFF
"""Place of an item of TiledCSL that only fills a four."""


def alignment(name: str, itemsize: int) -> int:
    """Values that a tile's begin is a multiple of."""
    return 4 if name == "tiled_csl" else 16 // itemsize


def stream_length(name: str, counts: np.ndarray | int, itemsize: int, capacity: int = 0) -> int:
    """Values that the stream needs: of the stored values of each tile, or of `capacity` in a number of tiles."""
    align = alignment(name, itemsize)
    spare = 0 if name == "tiled_csl" else SPARE // itemsize
    if isinstance(counts, int):
        # One output's worth more: where a traced mask does not fit, all outputs point at the beginning.
        return -(-capacity // align) * align + counts * align + spare + TILES[name][1]
    return int((-(-counts.astype(np.int64) // align) * align).sum()) + spare


def _layout(counts_of_rows, align: int, xp: ModuleType):
    """Begin of each tile (all tiles in order, and the end), and of each output in its tile."""
    rows = xp.cumsum(counts_of_rows, axis=-1, dtype=np.int32) - counts_of_rows
    counts = counts_of_rows.sum(-1, dtype=np.int32).reshape(-1)
    aligned = -(-counts // align) * align
    ends = xp.cumsum(aligned, dtype=np.int32)
    return xp.concatenate([xp.zeros(1, np.int32), ends]), rows


def _places(stored, starts, rows, xp: ModuleType):
    """Index of each stored element in the stream."""
    m, k = stored.shape[:2]
    return starts[:-1].reshape(m, k, 1, 1) + rows[..., None] + rank(stored, xp).astype(np.int32)


def _collect(tiles, stored, places, length: int, xp: ModuleType):
    """The stream of values of dense tiles."""
    if xp is np:
        stream = np.zeros(length, tiles.dtype)
        stream[places[stored]] = tiles[stored]
        return stream
    places = jnp.where(stored, places, length)
    return jnp.zeros(length, tiles.dtype).at[places.reshape(-1)].set(tiles.reshape(-1), mode="drop")


def pack(name: str, matrix, mask, *, length: int, xp: ModuleType, **meta) -> Bitmap | TiledCSL:
    """Packs `matrix` (already of the values' dtype) where `mask`, into a stream of `length` values."""
    tile, itemsize = meta["tile"], matrix.dtype.itemsize
    tiles, stored = to_tiles(matrix, tile, xp), to_tiles(mask, tile, xp)
    starts, rows = _layout(stored.sum(-1, dtype=np.int32), alignment(name, itemsize), xp)
    places = _places(stored, starts, rows, xp)
    stream = _collect(recast(tiles, unsigned(itemsize), xp), stored, places, length, xp)
    if name == "tiled_csl":
        inside = xp.arange(tile[0] * tile[1], dtype=np.int32).reshape(1, 1, *tile)
        inside = xp.broadcast_to(inside, stored.shape)
        where = _collect(inside + np.int32(1), stored, places, length, xp)  # 0 where nothing came
        where = xp.where(where == 0, np.int32(_NOWHERE), where - np.int32(1)).astype(np.uint32)
        items = stream.astype(np.uint32) | where << np.uint32(16)
        return TiledCSL(offsets=starts // np.int32(4), items=recast(items, np.int32, xp), **meta)
    return Bitmap(
        bits=pack_bits(stored, xp),
        tiles=starts[:-1].reshape(stored.shape[:2]),
        rows=rows.astype(np.int16),
        words=recast(stream, np.int32, xp),
        **meta,
    )


def _csl_places(packed: TiledCSL, xp: ModuleType):
    """Tile of each item, and its place there; `_NOWHERE` for what only fills."""
    items = xp.arange(packed.items.shape[0], dtype=np.int32) // np.int32(4)
    tile = xp.searchsorted(packed.offsets, items, side="right").astype(np.int32) - np.int32(1)
    where = recast(packed.items, np.uint32, xp) >> np.uint32(16)
    return tile, where.astype(np.int32)


def stored(packed: Bitmap | TiledCSL, xp: ModuleType):
    """Bool tiles: what is stored."""
    if isinstance(packed, Bitmap):
        return unpack_bits(packed.bits, xp)
    ones = xp.ones(packed.items.shape, bool)
    return expand(packed, ones, xp)


def values(packed: Bitmap | TiledCSL, xp: ModuleType):
    """The stream of values, with what lies between the tiles, in the values' dtype."""
    if isinstance(packed, Bitmap):
        return recast(packed.words, dtype_of(packed.values), xp)
    return recast(recast(packed.items, np.uint16, xp)[::2], dtype_of(packed.values), xp)


def with_values(packed: Bitmap | TiledCSL, stream, xp: ModuleType) -> Packed:
    """The same places, other values."""
    if isinstance(packed, Bitmap):
        return dataclasses.replace(packed, words=recast(stream, np.int32, xp))
    high = recast(packed.items, np.uint32, xp) & np.uint32(0xFFFF0000)
    items = high | recast(stream, np.uint16, xp).astype(np.uint32)
    return dataclasses.replace(packed, items=recast(items, np.int32, xp))


def _bitmap_places(packed: Bitmap, here, xp: ModuleType):
    return packed.tiles[..., None, None] + packed.rows.astype(np.int32)[..., None] + rank(here, xp).astype(np.int32)


def collect(packed: Bitmap | TiledCSL, tiles, xp: ModuleType):
    """The stream of dense tiles at the stored places, in the tiles' dtype; zero in between."""
    if isinstance(packed, Bitmap):
        here = stored(packed, xp)
        length = packed.words.shape[0] * 4 // packed.itemsize
        return _collect(tiles, here, _bitmap_places(packed, here, xp), length, xp)
    tile, where = _csl_places(packed, xp)
    inside = packed.tile[0] * packed.tile[1]
    found = tiles.reshape(-1, inside)[xp.minimum(tile, len(packed.offsets) - 2), xp.minimum(where, inside - 1)]
    return xp.where(where == _NOWHERE, tiles.dtype.type(0), found)


def expand(packed: Bitmap | TiledCSL, stream, xp: ModuleType):
    """Dense tiles from a stream; the inverse of `collect`."""
    if isinstance(packed, Bitmap):
        here = stored(packed, xp)
        return xp.where(here, stream[_bitmap_places(packed, here, xp)], stream.dtype.type(0))
    tile, where = _csl_places(packed, xp)
    inside = packed.tile[0] * packed.tile[1]
    count = packed.grid[0] * packed.grid[1]
    flat = xp.where(where == _NOWHERE, np.int32(count * inside), tile * np.int32(inside) + where)
    if xp is np:
        dense = np.zeros(count * inside + 1, stream.dtype)
        dense[flat] = stream
        return dense[:-1].reshape(*packed.grid, *packed.tile)
    return jnp.zeros(count * inside, stream.dtype).at[flat].set(stream, mode="drop").reshape(*packed.grid, *packed.tile)


def unpack(packed: Bitmap | TiledCSL, xp: ModuleType):
    """The stored values, dense `[d_in, d_out]`, not scaled."""
    return from_tiles(expand(packed, values(packed, xp), xp), packed.shape)
