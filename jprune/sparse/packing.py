"""From arrays to packed kernels and back: in the smallest format that holds a kernel, or not where dense is smaller."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import pallas_kernels
from jprune.annotations import Shaped
from jprune.errors import JpruneError
from jprune.sparse.kernel import PackedKernel
from pallas_kernels.formats import QUANTISED, TILES

Values = Literal["16", "int8", "float8_e4m3fn"]
"""How values are stored that are not stored as they are: in 16 bits, or in 8 with a scale for each output."""
_FORMAT = re.compile("auto|bitmap|capped:[1-4]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How kernels are stored."""

    format: str = "auto"
    """Of packed kernels: auto (the smallest that holds a kernel), bitmap (holds any zeros) or capped:C (at most C of
    every 8 consecutive inputs, C from 1 to 4; 2:4 and 4:8 are capped:4)."""
    values: Values | None = None
    """Of packed kernels: 16 (float32 is rounded to bfloat16), or int8 or float8_e4m3fn (rounded, with a scale for each
    output). By default they are stored as they are, and nothing is lost."""

    def __post_init__(self) -> None:
        if not _FORMAT.fullmatch(self.format):
            raise JpruneError(f"`format` is auto, bitmap or capped:C with C from 1 to 4; got {self.format!r}")
        if self.values is not None and self.values not in get_args(Values):
            raise JpruneError(f"`values` is {', '.join(get_args(Values))} or nothing; got {self.values!r}")

    def pack(self, kernels: Shaped[np.ndarray, "E ..."], inputs: int, path: str) -> tuple[PackedKernel, ...] | None:
        """Every kernel of a stack packed, all in one format; None where that is no smaller than the array.

        Args:
          kernels: `[E, *d_in, *d_out]`; a single kernel is a stack of one.
          inputs: number of input axes.
          path: of the parameter, for messages.

        Raises:
          JpruneError: the format that was asked for does not hold a kernel.
        """
        own = kernels.shape[1:]
        matrices = [self._converted(kernel.reshape(math.prod(own[:inputs]), -1)) for kernel in kernels]
        stored = None if self.values == "16" else self.values
        try:
            format = self._format(matrices, stored or matrices[0].dtype.name)
            packed = [PackedKernel(pallas_kernels.pack(m, format, values=stored), own) for m in matrices]  # type: ignore[arg-type]
        except pallas_kernels.FormatError as error:
            raise JpruneError(f"{path}: {error}") from error
        return tuple(packed) if sum(each.nbytes for each in packed) < kernels.nbytes else None

    def _converted(self, matrix: np.ndarray) -> np.ndarray:
        return matrix.astype(ml_dtypes.bfloat16) if self.values == "16" and matrix.dtype == np.float32 else matrix

    def _format(self, matrices: list[np.ndarray], values: str) -> str:
        """The format for kernels of these values."""
        if self.format != "auto":
            return self.format
        totals: dict[str, int] = {}
        for number, matrix in enumerate(matrices):
            choices = pallas_kernels.choose(matrix != 0, values=values, device="")
            fits = {c.format: c.nbytes for c in choices if c.holds and _FORMAT.fullmatch(c.format)}
            totals = fits if number == 0 else {name: totals[name] + fits[name] for name in totals if name in fits}
        return min(totals, key=totals.__getitem__)


def rounding(kernels: Shaped[np.ndarray, "E ..."], packed: tuple[PackedKernel, ...]) -> float:
    """What storing them packed cost: the norm of the difference over that of the kernels."""
    lost = whole = 0.0
    for kernel, kept in zip(kernels, packed):
        before = np.asarray(kernel, np.float32)
        lost += float(np.square(before - np.asarray(kept.dense(), np.float32)).sum(dtype=np.float64))
        whole += float(np.square(before).sum(dtype=np.float64))
    return math.sqrt(lost / whole) if whole else 0.0


def from_arrays(arrays: Mapping[str, np.ndarray], own: tuple[int, ...], inputs: int, dtype: np.dtype) -> PackedKernel:
    """One kernel of the arrays that `pallas_kernels.to_arrays` makes, checked as far as one can.

    Args:
      arrays: by their names.
      own: shape that the kernel must have.
      inputs: number of input axes.
      dtype: that it must have.

    Raises:
      JpruneError: another shape, a newer version, or arrays that do not fit together.
    """
    try:
        packed = pallas_kernels.from_arrays(arrays)
        kernel = PackedKernel(packed, own)  # type: ignore[arg-type]
        _check(kernel, inputs, dtype)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise JpruneError(said) from error
    return kernel


_DTYPES = {"bits": np.int32, "tiles": np.int32, "rows": np.int16, "words": np.int32, "scale": np.float32}


def _largest(dtype: str, values: str) -> np.float32:
    """The largest scale with which no weight of a dtype is too large; a little more, since scales are rounded."""
    return np.float32(float(jnp.finfo(dtype).max) / QUANTISED[values] * (1 + 2**-20))


def _check(kernel: PackedKernel, inputs: int, dtype: np.dtype) -> None:
    """Raises a ValueError where arrays are not those that packing makes: where values lie follows from the bits."""
    packed, d_in = kernel.packed, math.prod(kernel.own[:inputs])
    expected = (d_in, math.prod(kernel.own) // d_in)
    if not isinstance(packed, pallas_kernels.Bitmap | pallas_kernels.Capped):
        raise ValueError(f"packed as {packed.format}; expected bitmap or capped")
    if packed.tile != TILES[packed.name]:
        raise ValueError(f"tiles of {packed.tile}; expected {TILES[packed.name]}")
    if packed.shape != expected or kernel.dtype != dtype:
        raise ValueError(
            f"a packed kernel of {packed.dtype}{list(packed.shape)}; expected {dtype.name}{list(expected)}"
        )
    for name, want in _DTYPES.items():
        if (array := getattr(packed, name, None)) is not None and array.dtype != want:
            raise ValueError(f"packed array {name!r} is {array.dtype}; expected {np.dtype(want).name}")
    quantised = packed.values in QUANTISED
    if (packed.scale is not None) != quantised or (not quantised and packed.values != packed.dtype):
        raise ValueError(f"values {packed.values} of a {packed.dtype} kernel, scales {packed.scale is not None}")
    if quantised and not ((packed.scale > 0) & (packed.scale <= _largest(packed.dtype, packed.values))).all():
        raise ValueError(f"scales of outputs are not all above zero and such that weights fit {packed.dtype}")
    counts = np.bitwise_count(packed.bits.view(np.uint8))
    if isinstance(packed, pallas_kernels.Capped):
        if not 1 <= packed.capacity <= 4 or counts.max(initial=0) > packed.capacity:
            raise ValueError(f"{packed.format} with {counts.max(initial=0)} values in a group of 8")
        return
    outputs = counts.sum(-1, dtype=np.int32)
    align = 16 // np.dtype(f"V{packed.itemsize}").itemsize
    ends = np.cumsum(-(-outputs.sum(-1).reshape(-1) // align) * align)
    tiles = np.concatenate([[0], ends[:-1]])
    if (packed.rows != np.cumsum(outputs, -1) - outputs).any() or (packed.tiles.reshape(-1) != tiles).any():
        raise ValueError("the places of a bitmap's values are not those that its bits say")
    if len(packed.words) * 4 != (ends[-1] + align) * packed.itemsize:
        raise ValueError(f"a bitmap of {ends[-1]} values has {len(packed.words) * 4} bytes of them")
