"""Masks from scores: which elements to keep so that a pattern holds exactly. True = keep.

The k-th smallest score is found by counting, not by sorting: floats are mapped to integers of the same order, and
a search over those integers, by interpolation and bisection, settles the threshold in a few counting passes. It is
exact, its memory is one copy of the scores, and every pass is a compare and a sum, which all backends do fast.

Ties are settled by position: of equal scores, the lowest input index is pruned first (then the lowest output, where
outputs compete too). The authors' SparseGPT and magnitude code instead prunes everything `<=` the threshold, one
element too many and all ties with it.

The functions that count are plain, to be called within what is compiled. `select` lets the pattern choose, and patterns
compile what they run.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jprune.annotations import Array, Bool, Float, Int, UInt
from jprune.errors import JpruneError


@runtime_checkable
class Selects(Protocol):
    """What `select` asks of a pattern; all of `jprune.patterns` do it."""

    def select(self, scores: Any, keep: Any = None) -> Any:
        """The mask that satisfies the pattern and keeps the highest scores, see `select`."""
        ...


def select(
    scores: Float[Array, "d_in d_out"], pattern: Selects, *, keep: Bool[Array, "d_in d_out"] | None = None
) -> Bool[Array, "d_in d_out"]:
    """The mask that satisfies `pattern` and keeps the highest scores.

    Args:
      scores: importance, higher = keep; must not be NaN.
      pattern: what the zeros must look like. `Unstructured` whose `per` is open competes per output.
      keep: where False, the element is pruned whatever its score (it was pruned before). Such elements count towards
        the sparsity asked for, and none of them comes back.

    Returns:
      Mask, True = keep, with exactly `pattern.zeros(d_in, d_out)` zeros (more only if `keep` has more).

    Raises:
      JpruneError: the pattern does not fit d_in, or is none.
    """
    if not callable(getattr(pattern, "select", None)):
        raise JpruneError(f"a pattern is Unstructured(0.5), NM(2, 4) or another of jprune.patterns; got {pattern!r}")
    return pattern.select(scores, keep)


def without_lowest(
    scores: Float[Array, "d_in d_out"],
    count: Int[Array, ""] | int,
    *,
    per: Literal["output", "kernel"],
    keep: Bool[Array, "d_in d_out"] | None = None,
) -> Bool[Array, "d_in d_out"]:
    """The mask that prunes the `count` lowest scores of each output, or of the whole kernel.

    Args:
      scores: importance, higher = keep; must not be NaN.
      count: how many; may be traced, so that it can follow a schedule.
      per: where scores compete.
      keep: as for `select`.
    """
    if keep is not None:
        scores = jnp.where(keep, scores, -jnp.inf)
    mask = ~(smallest_of_all(scores, count) if per == "kernel" else smallest(scores, count))
    return mask if keep is None else mask & keep


def keep_n_of_m(scores: Float[Array, "d_in d_out"], n: Int[Array, ""] | int, m: int) -> Bool[Array, "d_in d_out"]:
    """Keeps the `n` highest of every `m` consecutive inputs of each output; d_in must be a multiple of m.

    `n` may be traced.
    """
    groups = scores.reshape(-1, m, scores.shape[-1])
    # rank = how many elements of the group are pruned before this one; m comparisons instead of a sort.
    rank = jnp.zeros(groups.shape, jnp.int32)
    index = jnp.arange(m)[:, None]
    for j in range(m):
        other = groups[:, j : j + 1]
        rank += ((other < groups) | ((other == groups) & (j < index))).astype(jnp.int32)
    return (rank >= m - n).reshape(scores.shape)


def smallest(scores: Float[Array, "n columns"], count: Int[Array, ""] | int) -> Bool[Array, "n columns"]:
    """Marks exactly `count` smallest entries of every column; of equal ones, those that come first."""
    n, columns = scores.shape
    # Columns in chunks of about 1 MiB stay in a core's cache over all passes.
    chunk = max(64, (1 << 18) // n)
    if columns <= chunk or not _in_chunks():
        return _smallest(scores, count)
    # The last chunk overlaps the one before it: of another width, it would be compiled for itself.
    chunks = -(-columns // chunk)
    starts = jnp.minimum(jnp.arange(chunks) * chunk, columns - chunk)
    marked = lax.map(lambda i: _smallest(lax.dynamic_slice_in_dim(scores, i, chunk, axis=1), count), starts)
    before = (chunks - 1) * chunk
    return jnp.concatenate(
        [jnp.moveaxis(marked[:-1], 0, 1).reshape(n, before), marked[-1][:, before - columns :]], axis=1
    )


def _in_chunks() -> bool:
    """Whether columns are taken in chunks. Where several devices share them out, all would fetch and search each."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def smallest_of_all(scores: Float[Array, "*shape"], count: Int[Array, ""] | int) -> Bool[Array, "*shape"]:
    """Marks exactly `count` smallest entries of the whole array; of equal ones, those that come first.

    Where the array lies in pieces on several devices, only counts are exchanged.
    """
    return _smallest(scores, count, axis=None)


def _smallest(scores, count, axis: int | None = 0):
    keys = _ordered_bits(scores)
    bound, below = _split(keys, count, axis)
    marked, missing = keys < bound, count - below
    # The search stops early where the bound separates exactly `count` entries, so float32 scores are hardly ever left
    # with ties to settle.
    return lax.cond(jnp.any(missing > 0), lambda: marked | _first(keys == bound, missing, axis), lambda: marked)


def _first(marked: Bool[Array, "..."], count, axis: int | None) -> Bool[Array, "..."]:
    """The first `count` of what is marked, of every column or (with axis None) of all.

    Where they end is found by bisection, too: XLA compiles a cumulative sum of a whole matrix for a second.
    """
    size = marked.size if axis is None else marked.shape[axis]
    places = jnp.arange(marked.size, dtype=jnp.uint32).reshape(marked.shape)
    places = places if axis is None else lax.broadcasted_iota(jnp.uint32, marked.shape, axis)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        few = _count(marked & (places < middle), axis) <= count
        return jnp.where(few, middle, low), jnp.where(few, high, middle)

    # Invariant: at most `count` before `low`; more than that before `high`, or no place there.
    low = jnp.zeros(jnp.shape(count) if axis is None else marked.shape[1:], jnp.uint32)
    end, _ = lax.fori_loop(0, (size + 1).bit_length(), halve, (low, low + jnp.uint32(size + 1)))
    return marked & (places < end)


def _split(keys: UInt[Array, "..."], count, axis: int | None = 0) -> tuple[UInt[Array, "..."], Int[Array, "..."]]:
    """For every column (or with axis None for all keys together), a bound and the number of keys below it.

    That number is `count`; or less, and then the bound is itself the key at which `count` is reached.
    """

    def unsettled(state):
        low, high, *_ = state
        return jnp.any(high - low > 1)

    def narrow(state):
        low, high, below, upto, turn = state
        width = high - low
        # Where the bound would be if keys were spread evenly: most of the way, that leaves as few as the square root of
        # the keys between. Every third time in the middle, in case they are spread in some other way.
        share = (count - below).astype(jnp.float32) / jnp.maximum(upto - below, 1).astype(jnp.float32)
        guess = jnp.minimum(share * width.astype(jnp.float32), 4.2e9).astype(jnp.uint32)
        step = jnp.clip(jnp.where(turn == 2, width // 2, guess), jnp.uint32(1), jnp.maximum(width, 2) - 1)
        middle = low + step
        n = _count(keys < middle, axis)
        # Exactly `count` below the middle: it is the bound, and an interval of one ends the search.
        up = n <= count
        low, below = jnp.where(up, middle, low), jnp.where(up, n, below)
        high, upto = jnp.where(up, high, middle), jnp.where(up, upto, n)
        return low, jnp.where(n == count, low + 1, high), below, upto, (turn + 1) % 3

    # Invariant: `below`, at most `count`, keys below `low`; `upto`, more than that, below `high`. A search interval of
    # one has found the bound.
    low, high = jnp.min(keys, axis=axis), jnp.max(keys, axis=axis) + jnp.uint32(1)
    none = jnp.zeros(low.shape, jnp.int32)
    every = none + (keys.size if axis is None else keys.shape[axis])
    bound, _, below, *_ = lax.while_loop(unsettled, narrow, (low, high, none, every, jnp.int32(0)))
    return bound, below


def _count(marked: Bool[Array, "..."], axis: int | None) -> Int[Array, "..."]:
    """How many are marked, of every column or (with axis None) of all.

    XLA sums all elements of a matrix in several passes on a CPU; a row of ones times the matrix is one, two to three
    times as fast, and float32 holds the count of a column of up to 2**24.
    """
    if axis is None and marked.ndim == 2 and len(marked) < 1 << 24 and jax.default_backend() == "cpu":
        columns = jnp.ones((1, len(marked)), jnp.float32) @ marked.astype(jnp.float32)
        return jnp.sum(columns.astype(jnp.int32))
    return jnp.sum(marked, axis=axis, dtype=jnp.int32)


def _ordered_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats; -0 is the same as +0."""
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
