"""What a mask asks of the formats, and which of them hold it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._shapes import Bool
from pallas_kernels.arrays import namespace, to_tiles
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import GROUP, NAMES, TILES, Format, TiledCSL, parse

Mask = Bool[np.ndarray | jax.Array, "d_in d_out"]


@dataclasses.dataclass(frozen=True)
class Demand:
    """What decides whether a format holds a mask."""

    stored: int
    """True elements."""
    group: int
    """Most in any 8 consecutive inputs of an output (groups begin at multiples of 8)."""
    csl_tile: int
    """Most in any tile of `TiledCSL`."""

    def holds(self, format: Format) -> bool:
        """Whether the format can store the mask."""
        if format.name == "capped":
            return self.group <= format.capacity
        return format.name == "bitmap" or self.csl_tile <= TiledCSL.MOST


def _counts(mask, tile, xp):
    """Stored elements of each group of each tile."""
    tiles = to_tiles(mask, tile, xp)
    return tiles.reshape(*tiles.shape[:3], -1, GROUP).sum(-1, dtype=np.int32)


def _measure(mask, xp):
    return (
        mask.sum(dtype=np.int32),
        _counts(mask, TILES["capped"], xp).max(),
        _counts(mask, TILES["tiled_csl"], xp).sum((-1, -2)).max(),
    )


_measure_jit = jax.jit(_measure, static_argnums=1)


def holds(mask: Mask, format: Format):
    """Whether the format can store a traced mask, as a traced bool."""
    if format.name == "bitmap":
        return jnp.bool_(True)
    counts = _counts(mask, TILES[format.name], jnp)
    if format.name == "capped":
        return counts.max() <= np.int32(format.capacity)
    return counts.sum((-1, -2)).max() <= np.int32(TiledCSL.MOST)


def measure(mask: Mask) -> Demand:
    """Counts what the formats' limits are about."""
    xp = namespace(mask)
    return Demand(*(int(x) for x in (_measure if xp is np else _measure_jit)(mask, xp)))


def _tile_counts(mask, tile, xp):
    return to_tiles(mask, tile, xp).sum((-1, -2), dtype=np.int32)


_tile_counts_jit = jax.jit(_tile_counts, static_argnums=(1, 2))


def count_tiles(mask: Mask, format: Format) -> np.ndarray:
    """Stored values of each of a format's tiles, `[tiles out, tiles in]`."""
    xp = namespace(mask)
    return np.asarray((_tile_counts if xp is np else _tile_counts_jit)(mask, TILES[format.name], xp))


def check(mask: Mask, format: Format) -> None:
    """Raises a FormatError that names the first tile that does not fit, and the formats that would hold the mask."""
    if format.name == "bitmap":
        return
    demand = measure(mask)
    if demand.holds(format):
        return
    others = " or ".join(name for name in NAMES if demand.holds(parse(name)))
    counts = np.asarray(_counts(mask, TILES[format.name], jnp if isinstance(mask, jax.Array) else np))
    rows, columns = TILES[format.name]
    if format.name == "capped":
        m, k, row, group = (int(i) for i in np.argwhere(counts > format.capacity)[0])
        first = k * columns + group * GROUP
        what = (
            f"holds at most {format.capacity} values in {GROUP} consecutive inputs of an output; output "
            f"{m * rows + row} has {counts[m, k, row, group]} in inputs {first} to {first + GROUP - 1} (tile {m}, {k})"
        )
    else:
        sums = counts.sum((-1, -2))
        m, k = (int(i) for i in np.argwhere(sums > TiledCSL.MOST)[0])
        what = (
            f"holds at most {TiledCSL.MOST} values in a tile of {rows} outputs x {columns} inputs; tile {m}, {k} "
            f"(outputs from {m * rows}, inputs from {k * columns}) has {sums[m, k]}"
        )
    raise FormatError(f"{format} {what}; {others} would hold this mask")
