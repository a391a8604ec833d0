"""Statistics: what is remembered of a matmul's input over the calibration tokens.

Each is a small pytree that starts at zero, takes batches of tokens and merges with another of its kind (batches,
devices, hosts), always summing in float32. Fields are not annotated with shapes because JAX also fills them with
abstract values and placeholders. Sums are kept, not means: they merge by addition, and no method here
depends on the scale. The authors of SparseGPT and Wanda keep 2/n sum x x^T and 1/n sum x^2 with n sequences.

Tokens may have weights, as padding has 0: a token of weight w counts w times in every sum, one of weight 0 is not read
at all (it may be NaN), and `tokens` is the number of those with a weight above 0.
"""

import dataclasses
import functools
import inspect
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jprune import devices, weighting
from jprune.annotations import Array, Float
from jprune.errors import JpruneError
from jprune.sorted_rows import Sorted, fold
from jprune.weighting import Weights

S = TypeVar("S")


@runtime_checkable
class Statistic(Protocol):
    """What every statistic can do.

    A class may also say what it costs, for forecasts: `flops(tokens, d_in)` of seeing so many tokens and `nbytes(d_in)`
    of one statistic, both class methods. Of one that does not, `flops` and `nbytes` of this module take what follows
    from its zeros.
    """

    @classmethod
    def zeros(cls: type[S], d_in: int) -> S:
        """Nothing seen yet."""
        ...

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        ...

    def update(self: S, x: Float[Array, "tokens d_in"]) -> S:
        """Having seen `x` too.

        With a second parameter ``weights=None``, ``[tokens]``, it can be gathered where tokens have weights.
        """
        ...

    def merge(self: S, other: S) -> S:
        """Having seen what either has seen."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sum:
    """A statistic whose fields are all sums."""

    total: Any
    """float32; its first axis numbers the inputs."""
    tokens: Any
    """Number of tokens with a weight above 0, int32 []."""

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.total.shape[0]

    def merge(self: S, other: S) -> S:
        """Having seen what either has seen."""
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SquaredNorm(_Sum):
    """||x_i||^2 of every input: `total` is the sum over tokens of x_i^2, [d_in]."""

    @classmethod
    def zeros(cls, d_in: int) -> "SquaredNorm":
        """Nothing seen yet."""
        return cls(jnp.zeros(d_in, jnp.float32), jnp.int32(0))

    @classmethod
    def flops(cls, tokens: int, d_in: int) -> float:
        """Operations of seeing so many tokens: a square and a sum of each value."""
        return 2.0 * tokens * d_in

    @classmethod
    def nbytes(cls, d_in: int) -> int:
        """Bytes of one statistic: a float32 of each input, and the count."""
        return 4 * d_in + 4

    def update(self, x: Float[Array, "tokens d_in"], weights: Weights | None = None) -> "SquaredNorm":
        """Having seen `x` too."""
        x, count = weighting.scaled(x, weights)
        return SquaredNorm(self.total + jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0), self.tokens + count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram(_Sum):
    """`total` is the sum over tokens of x x^T, [d_in, d_in], symmetric."""

    @classmethod
    def zeros(cls, d_in: int) -> "Gram":
        """Nothing seen yet."""
        return cls(jnp.zeros((d_in, d_in), jnp.float32), jnp.int32(0))

    @classmethod
    def flops(cls, tokens: int, d_in: int) -> float:
        """Operations of seeing so many tokens: two thirds of the product's, see `gram`."""
        return 4 / 3 * tokens * d_in**2

    @classmethod
    def nbytes(cls, d_in: int) -> int:
        """Bytes of one statistic: a float32 matrix, and the count."""
        return 4 * d_in**2 + 4

    def update(self, x: Float[Array, "tokens d_in"], weights: Weights | None = None) -> "Gram":
        """Having seen `x` too."""
        x, count = weighting.scaled(x, weights)
        return Gram(self.total + _gram(x), self.tokens + count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of every input (population variance: divided by the number of tokens, or their weight)."""

    mean: Any
    """float32 [d_in]."""
    squares: Any
    """Sum of squared distances from the mean, float32 [d_in]."""
    tokens: Any
    """Number of tokens with a weight above 0, int32 []."""
    weight: Any
    """Sum of the weights of all tokens, float32 []; their number, where they have none."""

    @classmethod
    def zeros(cls, d_in: int) -> "Moments":
        """Nothing seen yet."""
        return cls(jnp.zeros(d_in, jnp.float32), jnp.zeros(d_in, jnp.float32), jnp.int32(0), jnp.float32(0))

    @classmethod
    def flops(cls, tokens: int, d_in: int) -> float:
        """Operations of seeing so many tokens: a mean, distances from it, their squares and the sum of them."""
        return 4.0 * tokens * d_in

    @classmethod
    def nbytes(cls, d_in: int) -> int:
        """Bytes of one statistic: two float32 of each input, the count and the weight."""
        return 8 * d_in + 8

    def update(self, x: Float[Array, "tokens d_in"], weights: Weights | None = None) -> "Moments":
        """Having seen `x` too."""
        each = weighting.each(x, weights)
        counts = each[:, None] > 0
        x = jnp.where(counts, x.astype(jnp.float32), 0.0)
        weight = jnp.sum(each)
        mean = jnp.sum(each[:, None] * x, axis=0) / jnp.where(weight > 0, weight, 1.0)
        squares = jnp.sum(each[:, None] * jnp.square(x - mean), axis=0)
        return self.merge(Moments(mean, squares, jnp.sum(counts, dtype=jnp.int32), weight))

    def merge(self, other: "Moments") -> "Moments":
        """Having seen what either has seen: Chan et al. (1979), which does not cancel as sum x^2 - n mean^2 does."""
        weight = self.weight + other.weight
        share = other.weight / jnp.where(weight > 0, weight, 1.0)
        gap = other.mean - self.mean
        between = jnp.square(gap) * share * self.weight
        squares = self.squares + other.squares + between
        return Moments(self.mean + gap * share, squares, self.tokens + other.tokens, weight)

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.mean.shape[0]

    @property
    def variance(self) -> Float[Array, "d_in"]:
        """Population variance of every input."""
        return self.squares / jnp.where(self.weight > 0, self.weight, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A sum for each of a stack of kernels that have inputs of their own, such as experts.

    A token that is not sent to an expert has zeros there, or a weight of 0; either adds nothing to a sum, and is not
    counted.
    """

    each: Any
    """A `SquaredNorm` or `Gram` with one more axis in front of every field; or another statistic, to be merged only."""

    @classmethod
    def zeros(cls, kind: Any, d_in: int, count: int) -> "Stacked":
        """Nothing seen yet by `count` kernels."""
        if not issubclass(kind, _Sum):
            raise JpruneError(
                f"{kind.__name__} would count the zeros of tokens that an expert does not see; of stacked kernels only "
                "SquaredNorm and Gram can be gathered"
            )
        return cls(jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), kind.zeros(d_in)))

    @property
    def d_in(self) -> int:
        """Number of inputs of each kernel."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.each).d_in

    @property
    def tokens(self) -> Any:
        """Number of tokens that each kernel has seen, int32 [count]."""
        return self.each.tokens

    def update(self, x: Float[Array, "*count tokens d_in"] | Sorted, weights: Weights | None = None) -> "Stacked":
        """Having seen `x` too.

        Args:
          x: ``[count, tokens, d_in]``, inputs of each kernel; or ``[tokens, d_in]``, those of all of them, of which
            each sees what `weights` say; or rows sorted by their kernel, which have no weights.
          weights: of the tokens of each kernel, ``[count, tokens]``, or of all alike, ``[tokens]``. Where a router
            picks experts by their number, it is the one-hot form of the picks.
        """
        if isinstance(x, Sorted):
            return Stacked(fold(_counted, self.each, x))
        count, tokens = len(self.each.total), x.shape[-2]
        if weights is not None:
            weights = weighting.checked(weights, (count, tokens) if weights.ndim == 2 else (tokens,))
        axes = (0, 0 if x.ndim == 3 else None, 0 if weights is not None and weights.ndim == 2 else None)
        added = jax.vmap(update, in_axes=axes)(self.each, x, weights)
        seen = jnp.any(x != 0, axis=-1)
        seen = seen if weights is None else seen & (weights > 0)
        seen = jnp.sum(jnp.broadcast_to(seen, (count, tokens)), axis=-1, dtype=jnp.int32)
        return Stacked(dataclasses.replace(added, tokens=self.each.tokens + seen))

    def merge(self, other: "Stacked") -> "Stacked":
        """Having seen what either has seen."""
        return Stacked(jax.vmap(lambda a, b: a.merge(b))(self.each, other.each))

    def of(self, index: int) -> Any:
        """What one kernel has seen."""
        return jax.tree.map(lambda x: x[index], self.each)

    def alike(self) -> Any:
        """What a kernel has seen if nothing is known of it: inputs all of one size, and none like another."""
        total = jnp.ones if self.each.total.ndim == 2 else jnp.eye
        nothing = jax.tree.map(jnp.zeros_like, self.of(0))
        return dataclasses.replace(nothing, total=total(self.d_in, dtype=jnp.float32))


def _counted(own: Any, rows: Float[Array, "rows d_in"]) -> Any:
    """A sum having seen rows too, of which those of zeros do not count."""
    seen = jnp.sum(jnp.any(rows != 0, axis=-1), dtype=jnp.int32)
    return dataclasses.replace(own.update(rows), tokens=own.tokens + seen)


def zeros(kind: Any, d_in: int, *stack: int) -> Any:
    """A statistic that has seen nothing: of one kernel, or of a stack of so many."""
    return Stacked.zeros(kind, d_in, *stack) if stack else kind.zeros(d_in)


def update(statistic: Any, x: Float[Array, "*stack tokens d_in"], weights: Weights | None = None) -> Any:
    """The statistic having seen `x` too, each token by its weight if they have any.

    Raises:
      JpruneError: there are weights, and the class's `update` has no parameter for them; or they do not fit.
    """
    if weights is None:
        return statistic.update(x)
    parameters = inspect.signature(statistic.update).parameters.values()
    if not any(p.name == "weights" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise JpruneError(
            f"expected a statistic that takes weights of tokens, {type(statistic).__name__}.update has no parameter "
            "`weights`: give it one, `def update(self, x, weights=None)`, or gather it without weights"
        )
    return statistic.update(x, weights=weights)


def flops(kind: Any, tokens: int, d_in: int) -> float:
    """Operations of a statistic for so many tokens: what its class says, else two a token and number that it keeps."""
    if hasattr(kind, "flops"):
        return kind.flops(tokens, d_in)
    return 2.0 * tokens * sum(leaf.size for leaf in _leaves(kind, d_in))


def nbytes(kind: Any, d_in: int) -> int:
    """Bytes that one statistic of a class takes: what the class says, else those of the arrays of its zeros."""
    if hasattr(kind, "nbytes"):
        return kind.nbytes(d_in)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(kind, d_in))


def _leaves(kind: Any, d_in: int) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(lambda: kind.zeros(d_in)))


def update_in_parts(parts: S, x: Float[Array, "*stack tokens d_in"] | Sorted, mesh: Mesh) -> S:
    """Statistics with one more axis in front of every field, having seen one part each of `x`.

    With a part for every device of the mesh each device adds up what is there, and nothing is communicated; with one
    part it sees all of `x`. Sorted rows are in one part.
    """
    if isinstance(x, Sorted) or len(jax.tree.leaves(parts)[0]) == 1:
        own = jax.tree.map(lambda leaf: leaf[0], parts)
        return jax.tree.map(lambda leaf: leaf[None], own.update(x))
    each = devices.parts(mesh).spec
    rows = PartitionSpec(*[None] * (x.ndim - 2), *each)

    def add(parts: S, x: Float[Array, "*stack tokens d_in"]) -> S:
        return update_in_parts(parts, x, mesh)

    return jax.shard_map(add, mesh=mesh, in_specs=(each, rows), out_specs=each, check_vma=False)(parts, x)


def merge_parts(parts: S) -> S:
    """One statistic that has seen what all parts have, which are numbered by the first axis of every field."""
    each = parts.each if isinstance(parts, Stacked) else parts
    if isinstance(each, _Sum):  # one sum, and so one reduction over devices
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), parts)
    count = len(jax.tree.leaves(parts)[0])
    return functools.reduce(lambda a, b: a.merge(b), [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(count)])


def gram(x: Float[Array, "tokens d_in"]) -> Float[Array, "d_in d_in"]:
    """x^T x in float32: three upper block rows, mirrored, which is two thirds of the product's work.

    More block rows save more multiplications and lose more to narrow matmuls; three measured best from 576 to 4096
    inputs.
    """
    d_in = x.shape[1]
    x = x.astype(jnp.float32)
    starts = range(0, d_in, -(-d_in // 3))
    upper = [jnp.einsum("ti,tj->ij", x[:, i : i + starts.step], x[:, i:], precision="highest") for i in starts]
    rows = []
    for row, start in zip(upper, starts):
        mirrored = [above[:, start - i : start - i + row.shape[0]].T for above, i in zip(upper, starts) if i < start]
        rows.append(jnp.concatenate([*mirrored, row], axis=1))
    return jnp.concatenate(rows)


_gram = jax.jit(gram)  # outside of a compiled program the products' pieces would be in memory all at once
