"""Functions of a head's logits for many tokens, so few at a time that the logits stay small."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jprune.annotations import Array


def over_rows(
    f: Callable[..., tuple[Array, ...]], values: tuple[Array, ...], *, shares: int, most: int
) -> tuple[Array, ...]:
    """f of the rows of [batch, length, ...] arrays, at most `most` at a time, as [batch, length, ...] arrays.

    Args:
      f: takes [shares, rows, ...] of each value, and gives arrays of as many rows.
      values: alike in their first two axes.
      shares: parts of the batch that lie on different devices and are computed side by side.
      most: rows of each of them at a time.
    """
    batch, length = values[0].shape[:2]
    rows = batch // shares * length
    chunks = math.ceil(rows / max(1, most))
    size = math.ceil(rows / chunks)

    def cut(x: Array) -> Array:
        x = x.reshape(shares, rows, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, chunks * size - rows), *[(0, 0)] * (x.ndim - 2)))
        return jnp.swapaxes(x.reshape(shares, chunks, size, *x.shape[2:]), 0, 1)

    def joined(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1).reshape(shares, chunks * size, *x.shape[3:])
        return x[:, :rows].reshape(batch, length, *x.shape[2:])

    found = jax.lax.map(lambda part: f(*part), tuple(cut(x) for x in values))
    return tuple(joined(x) for x in found)
