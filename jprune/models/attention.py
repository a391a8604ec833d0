"""Causal grouped-query attention, with or without a cache of earlier keys and values.

Scores are computed a chunk of queries at a time: keys that a chunk cannot see (later ones, or earlier than its window)
are never touched, which halves the work of a full sequence, and only one chunk's scores are alive. On one CPU one
key/value head of one sequence is taken at a time: its products are of two-dimensional arrays, which XLA multiplies at
the machine's speed (of batches of small ones it does not), its scores stay in the cache, and the backward pass computes
them again instead of keeping those of all heads.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jprune.annotations import Array, DTypeLike, Float, Int
from jprune.train.remat import named

# Queries at a time, and how many different chunks at most (each is traced and compiled by itself).
CHUNK = 128
MAX_CHUNKS = 16
LONG = 128
"""Queries from which a CPU takes one head at a time; below that the products are small either way."""


class Cache(NamedTuple):
    """Keys (rotated) and values of the tokens seen so far, in buffers of fixed capacity S.

    Latent attention holds what both are made of as `keys`, and the part that is turned of keys as `values`.
    """

    keys: Float[Array, "B S K D"]
    values: Float[Array, "B S K E"]
    length: Int[Array, ""] | int  # tokens held; an int where it is known while tracing

    @classmethod
    def empty(
        cls, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: DTypeLike, *, values: int | None = None
    ) -> "Cache":
        """Room for `capacity` tokens; `values` is the size of a head's values where it is not that of its keys."""
        keys, held = (jnp.zeros((batch, capacity, kv_heads, size), dtype) for size in (head_dim, values or head_dim))
        return cls(keys, held, 0)

    def extend(self, keys: Float[Array, "B T K D"], values: Float[Array, "B T K E"]) -> "Cache":
        """Add T tokens after those held.

        The caller sees to it that they fit: a dynamic update past the end would silently overwrite earlier tokens.
        """
        at = (0, self.length, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.keys, keys, at),
            jax.lax.dynamic_update_slice(self.values, values, at),
            self.length + keys.shape[1],
        )


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    *,
    start: Int[Array, ""] | int = 0,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    slopes: Sequence[float] | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Query t stands at key `start + t` and sees itself and the earlier keys, at most `window` in all.

    Query head h reads key/value head h // (H / K), by a grouped contraction and not by repeating k and v. Scores and
    softmax are float32; the result has v's dtype.

    Args:
      scale: of the scores, D ** -0.5 unless given.
      cap: scores s become cap * tanh(s / cap) (arXiv:2408.00118).
      slopes: one for each of the H heads, by which its scores fall with the distance of the key (`alibi_slopes`).
      sinks: the score, of each head, of a key that everyone sees and that has no value (Xiao et al., arXiv:2309.17453,
        equation 2, learnt as in gpt-oss): weights sum to less than one.
    """
    batch, time, heads, head_dim = q.shape
    q = q.reshape(batch, time, k.shape[2], heads // k.shape[2], head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(k.shape[2], -1)
    if not isinstance(start, int):
        out = _attend(q, k, v, start, window, scale, cap, slopes, sinks)
    elif _one_by_one(time):
        out = _by_head(q, k, v, start, window, scale, cap, slopes, sinks)
    else:
        size = max(CHUNK, -(-time // MAX_CHUNKS))
        chunks = []
        for first in range(0, time, size):
            last = min(first + size, time)
            low = _first_seen(start + first, window)
            seen = slice(low, start + last)
            part = q[:, first:last], k[:, seen], v[:, seen]
            chunks.append(_attend(*part, start + first - low, window, scale, cap, slopes, sinks))
        out = jnp.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]
    return named(out.reshape(batch, time, heads, v.shape[3]))


def _one_by_one(time: int) -> bool:
    """Whether heads are taken one after the other. Several devices share sequences or heads, and take them together."""
    return time >= LONG and jax.default_backend() == "cpu" and jax.device_count() == 1


def _first_seen(query: int, window: int | None) -> int:
    """The earliest key that a query sees."""
    return 0 if window is None else max(query - window + 1, 0)


def _by_head(
    q: Float[Array, "B T K G D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    start: int,
    window: int | None,
    scale: float,
    cap: float | None,
    slopes: Sequence[float] | None,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "B T K G E"]:
    """One sequence and key/value head after the other."""
    batch, time, kv_heads, group, _ = q.shape
    falls = jnp.zeros((kv_heads, group)) if slopes is None else jnp.asarray(slopes, jnp.float32).reshape(kv_heads, -1)
    kept = jnp.zeros((kv_heads, group)) if sinks is None else sinks

    @jax.checkpoint
    def one(operands: tuple[Array, ...]) -> Array:
        queries, keys, values, fall, sink = operands
        # Different lengths of keys for at most MAX_CHUNKS segments; within a long one, chunks that all see its keys.
        segment = CHUNK * -(-time // (CHUNK * MAX_CHUNKS))
        done = []
        for first in range(0, time, segment):
            last = min(first + segment, time)
            low = _first_seen(start + first, window)
            seen = keys[low : start + last], values[low : start + last]

            def rows(part: tuple[Array, Array], seen: tuple[Array, Array] = seen) -> Array:
                chunk, at = part
                by_head = None if slopes is None else fall, None if sinks is None else sink
                return _rows(chunk, *seen, *by_head, at, window, scale, cap)

            whole = (last - first) // CHUNK * CHUNK
            at = start + first - low
            if whole > CHUNK:
                chunks = queries[first : first + whole].reshape(-1, CHUNK, *queries.shape[1:])
                several = jax.lax.map(rows, (chunks, at + CHUNK * jnp.arange(len(chunks))))
                done.append(several.reshape(whole, *several.shape[2:]))
            else:
                whole = 0
            if first + whole < last:
                done.append(rows((queries[first + whole : last], jnp.asarray(at + whole))))
        return jnp.concatenate(done)

    out = jax.lax.map(
        one,
        (
            q.swapaxes(1, 2).reshape(-1, time, group, q.shape[-1]),
            k.swapaxes(1, 2).reshape(-1, *k.shape[1::2]),
            v.swapaxes(1, 2).reshape(-1, *v.shape[1::2]),
            jnp.tile(falls, (batch, 1)),
            jnp.tile(kept, (batch, 1)),
        ),
    )
    return out.reshape(batch, kv_heads, time, group, -1).swapaxes(1, 2)


def _rows(
    q: Float[Array, "T G D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S E"],
    fall: Float[Array, "G"] | None,
    sink: Float[Array, "G"] | None,
    start: Int[Array, ""],
    window: int | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "T G E"]:
    """The queries of one key/value head, as rows of a matrix; query t stands at key `start + t`."""
    time, group, head_dim = q.shape
    scores = jnp.matmul(q.reshape(-1, head_dim), k.T, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    ago = start + jnp.arange(time * group)[:, None] // group - jnp.arange(len(k))  # [T G, S]
    if fall is not None:
        scores -= jnp.tile(fall, time)[:, None] * ago.astype(jnp.float32)
    visible = ago >= 0
    if window is not None:
        visible &= ago < window
    scores = jnp.where(visible, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    of_sink = None if sink is None else jnp.tile(sink, time)[:, None]
    top = jax.lax.stop_gradient(top if of_sink is None else jnp.maximum(top, of_sink))
    weights = jnp.exp(scores - top)
    sums = weights.sum(axis=-1, keepdims=True)
    if of_sink is not None:
        sums += jnp.exp(of_sink - top)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / sums
    return out.astype(v.dtype).reshape(time, group, -1)


def _attend(
    q: Float[Array, "B T K G D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    start: Int[Array, ""] | int,
    window: int | None,
    scale: float,
    cap: float | None,
    slopes: Sequence[float] | None,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "B T K G E"]:
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    ago = jnp.arange(q.shape[1])[:, None] + start - jnp.arange(k.shape[1])  # [T, S]
    if slopes is not None:
        fall = jnp.asarray(slopes, jnp.float32).reshape(q.shape[2], q.shape[3], 1, 1)
        scores -= fall * ago.astype(jnp.float32)
    visible = ago >= 0
    if window is not None:
        visible &= ago < window
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        column = jnp.broadcast_to(sinks[..., None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al., arXiv:2108.12409, section 3): 2^(-8/n), its square, ... for n heads.

    For n that is no power of two they are those of the next smaller power, followed by every other one of the next
    larger, as in the authors' code and in BLOOM.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return tuple([*slopes, *between][:heads])
