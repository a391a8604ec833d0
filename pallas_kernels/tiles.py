"""How a kernel is cut for a GPU: a table by device kind and shape class, with defaults that no GPU has measured yet.

`table.json` holds what `scripts/tune_kernels.py` measured: of each device kind, the best configuration of each class
of calls and backend, with its time and the dense matmul's in the same run. What is not in it gets the defaults below,
which come from counting registers and instructions (`scripts/kernel_code.py`), and no time.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import FormatError
from pallas_kernels.formats import Packed, dtype_of

DECODE_ABOVE = 128
"""Batches above this decode to dense first, where the table does not say otherwise. Estimated: decoding again for each
64 rows costs what a dense matmul costs at about 150."""
CORES = 132
"""Multiprocessors of a GPU that does not say: an H100's."""
_LARGE = 25_000_000
"""Weights above which a dense 16-bit kernel does not fit an H100's second-level cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """One configuration of a kernel."""

    rows: int = 128
    """Outputs of a program; divides the outputs of the format's tile."""
    warps: int = 4
    """Of 32 threads, a program."""
    stages: int = 1
    """Depth of Triton's software pipeline; 1 is none."""
    split: int = 1
    """Programs that share the inputs of an output."""

    def __post_init__(self):
        for name in ("rows", "warps", "stages", "split"):
            value = getattr(self, name)
            if value < 1 or (name in ("rows", "warps") and value & (value - 1)):
                raise FormatError(f"Tile.{name} is {value}; expected at least 1, and a power of 2 for rows and warps")


def tile_dtype(packed: Packed, x_dtype) -> Any:
    """What a tile is decoded to: the stored dtype, or for 8-bit values x's where it has 16 bits, else bfloat16."""
    if packed.itemsize > 1:
        return dtype_of(packed.values)
    return jnp.dtype(x_dtype if jnp.dtype(x_dtype).itemsize == 2 else jnp.bfloat16)


def dot_dtype(packed: Packed, x_dtype) -> Any:
    """What weights and x are multiplied in: the tile's dtype if it is x's, else float32."""
    dtype = tile_dtype(packed, x_dtype)
    return dtype if dtype == x_dtype else jnp.dtype(jnp.float32)


def block_of(n: int) -> int:
    """Rows of x that a program multiplies, of a batch of n: 16, 32 or 64."""
    return min(64, max(16, 1 << (n - 1).bit_length()))


def shape_class(packed: Packed, n: int, backend: str = "pallas") -> str:
    """What calls share a configuration: format, values, rows of x, whether the kernel outgrows the cache; backend."""
    return class_name(packed.format, packed.values, packed.shape[0] * packed.shape[1], n, backend)


def class_name(format: str, values: str, weights: int, n: int, backend: str = "pallas") -> str:
    """The same, of a kernel that is not packed yet."""
    size = "large" if weights > _LARGE else "small"
    return f"{format} {values} n={block_of(n)} {size}" + ("" if backend == "pallas" else f" {backend}")


@functools.cache
def table() -> dict[str, Any]:
    """Device kind to its "classes" (see `shape_class`) and its "decode_above"; empty until a GPU was measured."""
    return json.loads(resources.files("pallas_kernels").joinpath("table.json").read_text())["devices"]


def device() -> tuple[str, int]:
    """Kind and multiprocessors of the GPU that programs run on; ("", `CORES`) where there is none."""
    if jax.default_backend() != "gpu":
        return "", CORES
    first = jax.devices()[0]
    return first.device_kind, getattr(first, "core_count", CORES)


def decode_above() -> int:
    """The largest batch that the kernels multiply without decoding to dense first."""
    return table().get(device()[0], {}).get("decode_above", DECODE_ABOVE)


def choose_tile(packed: Packed, n: int, backend: str = "pallas") -> Tile:
    """The configuration for a batch of n rows, from the table or by default."""
    kind, cores = device()
    entry = table().get(kind, {}).get("classes", {}).get(shape_class(packed, n, backend), {})
    # Float32 products do without tensor cores and need twice the registers.
    rows = min(entry.get("rows", 64 if packed.values == "float32" else 128), packed.tile[0])
    resident = entry.get("resident", 4)
    return Tile(
        rows=rows,
        warps=entry.get("warps", 4),
        stages=entry.get("stages", 1),
        split=split_of(packed, n, rows, resident * cores),
    )


def share_of(index, steps: int, split: int):
    """First tile and number of tiles of one of `split` shares of `steps` tiles; `index` may be traced.

    All shares are as long but the last ones. Of an empty one the first tile is one of the `steps` all the same: a
    kernel reads ahead before it knows how much it has to do.
    """
    least, most = (min, max) if isinstance(index, int) else (jnp.minimum, jnp.maximum)
    each = -(-steps // split)
    begin = index * each
    count = each if steps % split == 0 else least(each, steps - begin)
    if some_are_empty(steps, split):
        return least(begin, steps - 1), most(count, 0)
    return begin, count


def some_are_empty(steps: int, split: int) -> bool:
    """Whether the last of `split` shares has nothing left of `steps` tiles."""
    return -(-steps // split) * (split - 1) >= steps


def split_of(packed: Packed, n: int, rows: int, places: int) -> int:
    """Shares of the inputs: fills the GPU's places evenly, at the price of writing and reading partial sums.

    Work comes in waves of `places` programs, and a last wave that is half empty takes as long as a full one.
    """
    outputs, steps = packed.grid[0] * packed.tile[0], packed.grid[1]
    programs = outputs // rows * -(-n // block_of(n))
    bytes_a_weight = packed.nbytes / (outputs * steps * packed.tile[1])
    partial = 8 * min(n, block_of(n)) / (steps * packed.tile[1] * bytes_a_weight)

    def cost(split):
        waves = -(-programs * split // places)
        # Half of a partial sum's bytes: they mostly stay in the cache.
        return waves * places / (programs * split) + partial * split / 2

    splits = range(1, max(1, min(16, steps // 4)) + 1)
    return min((split for split in splits if not some_are_empty(steps, split)), key=cost)
