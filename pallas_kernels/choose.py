"""`choose`: which formats hold a mask, what they weigh, and what time to expect against dense."""

import dataclasses

import jax
import numpy as np

from pallas_kernels import tiles
from pallas_kernels._shapes import Bool
from pallas_kernels.bitmap import stream_length
from pallas_kernels.demand import count_tiles, measure
from pallas_kernels.formats import NAMES, TILES, dtype_of, parse, plane_bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """One format for one mask."""

    format: str
    """As `pack` takes it, or "dense"."""
    holds: bool
    """Whether the format can store the mask."""
    nbytes: int
    """Of the packed kernel; 0 if it cannot be stored."""
    speedup: float | None
    """Measured time of dense over that of this format, for kernels of this class; None where nothing was measured."""


def choose(
    mask: Bool[np.ndarray | jax.Array, "d_in d_out"],
    *,
    values: str = "bfloat16",
    batch: int = 16,
    device: str | None = None,
    backend: str = "pallas",
) -> tuple[Choice, ...]:
    """Every format for a mask: those that hold it first, the smallest first.

    Args:
      mask: True = keep.
      values: dtype of the values, as `pack` would store them.
      batch: rows of x that are multiplied at a time.
      device: kind of GPU, as JAX names it; the one here if None.
      backend: of `matmul`, "pallas" or "triton": whose times are asked for.

    Returns:
      A `Choice` for every format that can store such values, and for "dense" (in 16 bits, or 32 of float32 values).
    """
    d_in, d_out = mask.shape
    demand = measure(mask)
    entries = tiles.table().get(tiles.device()[0] if device is None else device, {}).get("classes", {})
    dense = Choice("dense", True, d_in * d_out * max(2, dtype_of(values).itemsize), 1.0)
    choices = [dense]
    for name in NAMES:
        if name == "tiled_csl" and dtype_of(values).itemsize != 2:
            continue
        holds = demand.holds(parse(name))
        entry = entries.get(tiles.class_name(name, values, d_in * d_out, batch, backend), {}) if holds else {}
        speedup = entry["dense_microseconds"] / entry["microseconds"] if entry else None
        choices.append(Choice(name, holds, _nbytes(mask, name, values) if holds else 0, speedup))
    return tuple(sorted(choices, key=lambda c: (not c.holds, c.nbytes)))


def _nbytes(mask, format: str, values: str) -> int:
    """Bytes of the packed kernel, without packing it."""
    parsed, itemsize = parse(format), dtype_of(values).itemsize
    rows, columns = TILES[parsed.name]
    count = -(-mask.shape[1] // rows) * -(-mask.shape[0] // columns)
    scale = 4 * mask.shape[1] if itemsize == 1 else 0
    if parsed.name == "capped":
        return count * rows * (columns // 8) * (1 + sum(plane_bytes(parsed.capacity, itemsize))) + scale
    length = stream_length(parsed.name, count_tiles(mask, parsed), itemsize)
    if parsed.name == "tiled_csl":
        return 4 * length + 4 * (count + 1)
    return itemsize * length + count * (rows * columns // 8 + 2 * rows + 4) + scale
