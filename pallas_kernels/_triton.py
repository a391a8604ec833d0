"""The backend "triton": the kernels of `triton_kernels`, called by `jax_triton`; the same functions as `_pallas`.

This is the only module that knows of `jax_triton`, which needs a JAX with a GPU's plugin. What is called is described
by a `Launch` first, which Triton's interpreter can run (`interpreter`) and its compiler compile where no GPU is.
"""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl

from pallas_kernels import interpreter, triton_kernels
from pallas_kernels._shapes import Array, Float
from pallas_kernels.errors import FormatError
from pallas_kernels.formats import Bitmap, Capped, Packed
from pallas_kernels.tiles import Tile, block_of, dot_dtype, tile_dtype


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    """A `triton.jit` function of pointers to the arrays, a pointer to the result, and the constants."""
    arrays: tuple
    out: jax.ShapeDtypeStruct
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int
    stages: int


def _language(dtype) -> tl.dtype:
    return getattr(tl, np.dtype(dtype).name)


def _inputs(packed: Packed) -> tuple[str, tuple, dict]:
    """Name, arrays and constants of a format's kernels."""
    constants: dict = {"TILE_ROWS": packed.tile[0], "COLUMNS": packed.tile[1], "VALUES": packed.values}
    if isinstance(packed, Capped):
        planes = packed.planes
        constants["PLANES"] = len(planes)
        return "capped", (packed.bits, *planes, *planes[:1] * (4 - len(planes))), constants
    if isinstance(packed, Bitmap):
        return "bitmap", (packed.tiles, packed.rows, packed.bits, packed.words), constants
    raise TypeError(f"no kernel reads {packed.name}")


def launch_multiply(x, packed: Packed, tile: Tile, *, asm: bool = True) -> Launch:
    """Of `multiply`, whose x has its columns padded already."""
    name, arrays, constants = _inputs(packed)
    n, block, d_out = x.shape[0], block_of(x.shape[0]), packed.grid[0] * packed.tile[0]
    constants |= {"STEPS": packed.grid[1], "SPLIT": tile.split, "N": n, "BLOCK": block, "ROWS": tile.rows, "ASM": asm}
    # The interpreter multiplies bfloat16's bits as integers; float32 holds the products of 16-bit floats exactly.
    dot = dot_dtype(packed, x.dtype) if asm else jnp.float32
    constants |= {"DTYPE": _language(tile_dtype(packed, x.dtype)), "DOT": _language(dot)}
    return Launch(
        getattr(triton_kernels, f"{name}_multiply"),
        (*arrays, x),
        jax.ShapeDtypeStruct((tile.split, n, d_out), jnp.float32),
        (d_out // tile.rows, tile.split, -(-n // block)),
        constants,
        tile.warps,
        tile.stages,
    )


def launch_dense(packed: Packed, first: int, last: int, tile: Tile, dtype, *, asm: bool = True) -> Launch:
    """Of `dense_rows`."""
    name, arrays, constants = _inputs(packed)
    outputs, steps = (last - first) * packed.tile[0], packed.grid[1]
    constants |= {"STEPS": steps, "FIRST": first, "ROWS": tile.rows, "DTYPE": _language(dtype), "ASM": asm}
    return Launch(
        getattr(triton_kernels, f"{name}_dense"),
        arrays,
        jax.ShapeDtypeStruct((outputs, steps * packed.tile[1]), dtype),
        (outputs // tile.rows, steps, 1),
        constants,
        tile.warps,
        tile.stages,
    )


def multiply(
    x: Float[Array, "n d_in"], packed: Packed, tile: Tile, *, interpret: bool = False
) -> Float[Array, "split n d_out_padded"]:
    """As `_pallas.multiply`."""
    x = jnp.pad(x, ((0, 0), (0, packed.grid[1] * packed.tile[1] - x.shape[1])))
    return _call(launch_multiply(x, packed, tile, asm=not interpret), interpret)


def dense_rows(
    packed: Packed, first: int, last: int, tile: Tile, dtype, *, interpret: bool = False
) -> Float[Array, "outputs d_in_padded"]:
    """As `_pallas.dense_rows`."""
    return _call(launch_dense(packed, first, last, tile, dtype, asm=not interpret), interpret)


def _call(launch: Launch, interpret: bool) -> jax.Array:
    if interpret:
        return interpreter.call(launch)
    jax_triton = require()
    # The name changed in jax-triton 0.4.
    out = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    return jax_triton.triton_call(
        *launch.arrays,
        kernel=launch.kernel,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **{out: launch.out},
        **launch.constants,
    )


def require():
    """`jax_triton`, or a FormatError that says what is missing."""
    install = "pip install 'jprune[gpu]' has versions that go together, or use backend='pallas'"
    try:
        import jax_triton
    except ImportError as error:
        reason = str(error).split("\n")[0]
        raise FormatError(f"backend='triton' needs jax-triton and JAX for a GPU ({reason}): {install}") from error
    if jax.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
        raise FormatError(
            f"backend='triton': jax-triton {jax_triton.__version__} does not work with jax {jax.__version__}, but with "
            f"0.11: {install}"
        )
    return jax_triton
