"""Statistics: what is remembered of a matmul's input over the calibration tokens.

Each is a small pytree that starts at zero, takes batches of tokens and merges with another of its kind (batches,
devices, hosts), always summing in float32. Fields are not annotated with shapes because JAX also fills them with
abstract values and placeholders. Sums are kept, not means: they merge by addition, and no method here
depends on the scale. The authors of SparseGPT and Wanda keep 2/n sum x x^T and 1/n sum x^2 with n sequences.
"""

import dataclasses
import functools
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jprune import devices
from jprune.errors import JpruneError

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
        """Having seen `x` too."""
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
    """Number of tokens, int32 []."""

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

    def update(self, x: Float[Array, "tokens d_in"]) -> "SquaredNorm":
        """Having seen `x` too."""
        return SquaredNorm(self.total + jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0), self.tokens + x.shape[0])


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

    def update(self, x: Float[Array, "tokens d_in"]) -> "Gram":
        """Having seen `x` too."""
        return Gram(self.total + _gram(x), self.tokens + x.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of every input (population variance: divided by the number of tokens)."""

    mean: Any
    """float32 [d_in]."""
    squares: Any
    """Sum of squared distances from the mean, float32 [d_in]."""
    tokens: Any
    """Number of tokens, int32 []."""

    @classmethod
    def zeros(cls, d_in: int) -> "Moments":
        """Nothing seen yet."""
        return cls(jnp.zeros(d_in, jnp.float32), jnp.zeros(d_in, jnp.float32), jnp.int32(0))

    @classmethod
    def flops(cls, tokens: int, d_in: int) -> float:
        """Operations of seeing so many tokens: a mean, distances from it, their squares and the sum of them."""
        return 4.0 * tokens * d_in

    @classmethod
    def nbytes(cls, d_in: int) -> int:
        """Bytes of one statistic: two float32 of each input, and the count."""
        return 8 * d_in + 4

    def update(self, x: Float[Array, "tokens d_in"]) -> "Moments":
        """Having seen `x` too."""
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=0)
        return self.merge(Moments(mean, jnp.sum(jnp.square(x - mean), axis=0), jnp.int32(x.shape[0])))

    def merge(self, other: "Moments") -> "Moments":
        """Having seen what either has seen: Chan et al. (1979), which does not cancel as sum x^2 - n mean^2 does."""
        tokens = self.tokens + other.tokens
        share = other.tokens.astype(jnp.float32) / jnp.maximum(tokens, 1).astype(jnp.float32)
        gap = other.mean - self.mean
        between = jnp.square(gap) * share * self.tokens.astype(jnp.float32)
        return Moments(self.mean + gap * share, self.squares + other.squares + between, tokens)

    @property
    def d_in(self) -> int:
        """Number of inputs."""
        return self.mean.shape[0]

    @property
    def variance(self) -> Float[Array, "d_in"]:
        """Population variance of every input."""
        return self.squares / jnp.maximum(self.tokens, 1).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A sum for each of a stack of kernels that have inputs of their own, such as experts.

    A token that is not sent to an expert has zeros there; they add nothing to a sum, and are not counted.
    """

    each: Any
    """A `SquaredNorm` or `Gram` with one more axis in front of every field."""

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
        return self.each.total.shape[1]

    @property
    def tokens(self) -> Any:
        """Number of tokens that each kernel has seen, int32 [count]."""
        return self.each.tokens

    def update(self, x: Float[Array, "count tokens d_in"]) -> "Stacked":
        """Having seen `x` too."""
        added = jax.vmap(lambda each, x: each.update(x))(self.each, x)
        seen = jnp.sum(jnp.any(x != 0, axis=-1), axis=-1, dtype=jnp.int32)
        return Stacked(dataclasses.replace(added, tokens=self.each.tokens + seen))

    def merge(self, other: "Stacked") -> "Stacked":
        """Having seen what either has seen."""
        return Stacked(self.each.merge(other.each))

    def of(self, index: int) -> Any:
        """What one kernel has seen."""
        return jax.tree.map(lambda x: x[index], self.each)

    def alike(self) -> Any:
        """What a kernel has seen if nothing is known of it: inputs all of one size, and none like another."""
        total = jnp.ones if self.each.total.ndim == 2 else jnp.eye
        return dataclasses.replace(self.of(0), total=total(self.d_in, dtype=jnp.float32), tokens=jnp.int32(0))


def zeros(kind: Any, d_in: int, *stack: int) -> Any:
    """A statistic that has seen nothing: of one kernel, or of a stack of so many."""
    return Stacked.zeros(kind, d_in, *stack) if stack else kind.zeros(d_in)


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


def update_in_parts(parts: S, x: Float[Array, "*stack tokens d_in"], mesh: Mesh) -> S:
    """Statistics with one more axis in front of every field, having seen one part each of `x`.

    With a part for every device of the mesh each device adds up what is there, and nothing is communicated; with one
    part it sees all of `x`.
    """
    if len(jax.tree.leaves(parts)[0]) == 1:
        own = jax.tree.map(lambda leaf: leaf[0], parts)
        return jax.tree.map(lambda leaf: leaf[None], own.update(x))
    each = devices.parts(mesh).spec
    rows = PartitionSpec(*[None] * (x.ndim - 2), *each)

    def add(parts: S, x: Float[Array, "*stack tokens d_in"]) -> S:
        return update_in_parts(parts, x, mesh)

    return jax.shard_map(add, mesh=mesh, in_specs=(each, rows), out_specs=each, check_vma=False)(parts, x)


def merge_parts(parts: S) -> S:
    """One statistic that has seen what all parts have, which are numbered by the first axis of every field."""
    if isinstance(parts, _Sum | Stacked):  # one sum, and so one reduction over devices
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
