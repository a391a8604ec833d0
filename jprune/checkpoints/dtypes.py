"""Dtypes by their names, and the one that a model is computed in."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jprune.checkpoints.model import Model
from jprune.errors import JpruneError


def activation_dtype(checkpoint: Model, name: str | None) -> DTypeLike:
    """The dtype activations have: as named, or float32 on CPU and the weights' own elsewhere.

    CPUs multiply in float32 many times faster than in bfloat16.
    """
    if name is not None:
        return parse_dtype(name)
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return checkpoint.shapes["embed/embedding"].dtype


def parse_dtype(name: str) -> Any:
    """A float dtype by its name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise JpruneError(f"dtype must be float32, bfloat16 or float16; got {name!r}")
    return jnp.dtype(name)
