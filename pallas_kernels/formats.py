"""The packed formats: what is stored of a sparse kernel, and where.

A kernel is `[d_in, d_out]`. All formats cut its transpose into tiles of `tile` = (outputs, inputs), padded with zeros
to whole tiles, so that one program of a GPU reads one contiguous piece of memory per step. Integers hold everything,
also the values' bits: a GPU loads 32-bit words and takes them apart in registers (`decode`).

| format | holds | bytes a weight, 16-bit values |
| --- | --- | --- |
| `Capped` | at most C of each 8 consecutive inputs of an output | C / 4 + 1 / 8 |
| `Bitmap` | any pattern | 2 density + 1 / 8 + 2 / tile inputs |
| `TiledCSL` | any pattern at most half dense per tile (Flash-LLM, https://arxiv.org/abs/2309.10285) | 4 density |

Values are bfloat16, float16 or float32, or int8 and float8 (e4m3) with one float32 scale an output.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import FormatError

VERSION = 1
"""Of the packed layout; data of a newer version is refused."""
GROUP = 8
"""Consecutive inputs that share the C slots of `Capped`."""
FLOATS = ("bfloat16", "float16", "float32")
QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Quantised values and the number that an output's largest magnitude becomes."""
Leaf = Any
"""An integer array (NumPy or JAX), or whatever a pytree transformation puts in its place."""


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a name, with those that NumPy alone does not know."""
    return np.dtype(getattr(jnp, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """What every format has; subclasses add the arrays."""

    name: ClassVar[str]

    scale: Leaf = None
    """Float32 `[d_out]`: a stored value times this is the weight. None unless the values are quantised."""
    shape: tuple[int, int]
    """(d_in, d_out) of the kernel."""
    dtype: str
    """Of the kernel, as `unpack` returns it."""
    values: str
    """Dtype of the stored values."""
    tile: tuple[int, int]
    """(outputs, inputs) of a tile."""
    version: int = VERSION

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along outputs and inputs."""
        return -(-self.shape[1] // self.tile[0]), -(-self.shape[0] // self.tile[1])

    @property
    def itemsize(self) -> int:
        """Bytes of a stored value."""
        return dtype_of(self.values).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    @property
    def format(self) -> str:
        """The name that `pack` takes."""
        return self.name

    def __repr__(self) -> str:
        quantised = f" values={self.values}" if self.values != self.dtype else ""
        return f"<{self.format} {self.dtype}[{self.shape[0]}, {self.shape[1]}]{quantised} tile={self.tile}>"


def _register(cls):
    meta = {"shape", "dtype", "values", "tile", "version", "capacity"}
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(
        cls, data_fields=[n for n in names if n not in meta], meta_fields=[n for n in names if n in meta]
    )


@_register
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Capped(Packed):
    """At most `capacity` non-zeros in each 8 consecutive inputs of an output: fixed stride, no offsets.

    2:4, 4:8, 1:4, 2:8 and 3:8 masks all fit. The slots of a group are its values in the order of the inputs, cut into
    planes of 4, 2 and 1 bytes, the largest first, so that three 16-bit slots take six bytes and not eight.
    """

    name: ClassVar[str] = "capped"

    capacity: int
    """C, 1 to 4."""
    bits: Leaf
    """Int32 `[tiles out, tiles in, outputs, inputs / 32]`: bit i is whether input i of the word is stored."""
    planes: tuple[Leaf, ...]
    """Int32, int16 or int8 `[tiles out, tiles in, outputs, inputs / 8]` each, little-endian pieces of the slots."""

    @property
    def format(self) -> str:
        """The name that `pack` takes."""
        return f"capped:{self.capacity}"


@_register
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Bitmap(Packed):
    """Any pattern: one bit a weight, the values of a tile side by side, output by output."""

    name: ClassVar[str] = "bitmap"

    bits: Leaf
    """Int32 `[tiles out, tiles in, outputs, inputs / 32]`: bit i is whether input i of the word is stored."""
    tiles: Leaf
    """Int32 `[tiles out, tiles in]`: where the values of a tile begin, in values; a multiple of 16 bytes."""
    rows: Leaf
    """Int16 `[tiles out, tiles in, outputs]`: where the values of an output begin in its tile, in values."""
    words: Leaf
    """Int32 `[words]`: the values, and 16 spare bytes, so that whole words can be read past the last one."""


@_register
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TiledCSL(Packed):
    """Flash-LLM's format, for comparison: 32 bits a stored value, its place in the tile in the upper 16.

    Their order of the items (which avoids bank conflicts of their shared-memory writes) and swizzled places have no
    use here and are left out; size and capacity are theirs.
    """

    name: ClassVar[str] = "tiled_csl"
    MOST: ClassVar[int] = 4096
    """Items that the original's registers hold of a tile of 128 x 64; it silently drops what is above."""

    offsets: Leaf
    """Int32 `[tiles + 1]`: where a tile begins, in fours of items; tiles run along the inputs first."""
    items: Leaf
    """Int32 `[items]`: the value's bits below, output * 64 + input of its place in the tile above."""


FORMATS: dict[str, type[Packed]] = {cls.name: cls for cls in (Capped, Bitmap, TiledCSL)}
TILES: dict[str, tuple[int, int]] = {"capped": (128, 128), "bitmap": (128, 64), "tiled_csl": (128, 64)}
"""Tile of each format; `docs/kernels.md` says why."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A parsed format name."""

    name: Literal["capped", "bitmap", "tiled_csl"]
    capacity: int = 0
    """C of `Capped`, else 0."""

    def __str__(self) -> str:
        return f"{self.name}:{self.capacity}" if self.capacity else self.name


NAMES = ("capped:1", "capped:2", "capped:3", "capped:4", "bitmap", "tiled_csl")
"""Everything that `pack` takes."""


def parse(format: str) -> Format:
    """The format of a name such as "capped:4", "bitmap" or "tiled_csl"; raises FormatError for any other."""
    if format not in NAMES:
        raise FormatError(f"format {format!r} is not known; expected one of {', '.join(NAMES)}")
    name, _, capacity = format.partition(":")
    return Format(name, int(capacity or 0))  # type: ignore[arg-type]


def plane_bytes(capacity: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of the planes that the slots of a group are cut into: 3 slots of 2 bytes are (4, 2)."""
    left = capacity * itemsize
    return (4,) * (left // 4) + (2,) * (left % 4 // 2) + (1,) * (left % 2)
