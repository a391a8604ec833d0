"""Dtypes by their names, the one that a model is computed in, and casts between them that lose no number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jprune.checkpoints.model import Model
from jprune.errors import JpruneError


def activation_dtype(checkpoint: Model, name: str | None) -> DTypeLike:
    """The dtype activations have: as named, or float32 on CPU and for float16 weights, else the weights' own.

    CPUs multiply in float32 many times faster than in bfloat16. Activations of models whose weights fit float16 often
    do not: beyond 65504 they are infinite, and statistics of them say nothing.
    """
    if name is not None:
        return parse_dtype(name)
    stored = checkpoint.shapes["embed/embedding"].dtype
    if jax.default_backend() == "cpu" or stored == jnp.float16:
        return jnp.dtype(jnp.float32)
    return stored


def parse_dtype(name: str) -> Any:
    """A float dtype by its name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise JpruneError(f"dtype must be float32, bfloat16 or float16; got {name!r}")
    return jnp.dtype(name)


def cast(values: np.ndarray, dtype: DTypeLike, name: str, *, saturate: bool = False) -> np.ndarray:
    """An array in another float dtype; the array itself where that is its own.

    Args:
        values: floats. Infinities and NaNs among them stay.
        dtype: of the result.
        name: of the tensor, for messages.
        saturate: finite numbers beyond the dtype's range become its largest, instead of being refused.

    Raises:
        JpruneError: a finite number would become infinite.
    """
    dtype = np.dtype(dtype)
    if values.dtype == dtype:
        return values
    most = float(jnp.finfo(dtype).max)
    with np.errstate(over="ignore", invalid="ignore"):  # NaNs of every kind are numbers like others here
        narrow = values.astype(dtype)
        if float(jnp.finfo(values.dtype).max) <= most:
            return narrow
        lost = np.isinf(narrow) & ~np.isinf(values)
    if not lost.any():
        return narrow
    if saturate:
        return np.where(lost, np.copysign(dtype.type(most), narrow), narrow)
    finite = values[np.isfinite(values)]
    raise JpruneError(
        f"{name}: {int(lost.sum())} of {values.size} numbers do not fit {dtype.name}, whose largest is {most:.5g}; the "
        f"tensor's are between {finite.min():.5g} and {finite.max():.5g}. Write another dtype (bfloat16 has float32's "
        "range), or `saturate` them"
    )
