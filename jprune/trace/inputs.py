"""What a kernel is multiplied with, as matrices of tokens by features, and how a statistic sees them.

Of a stack of kernels each has inputs of its own: other rows of the value where an axis of the kernel runs along with
one of the value, or the rows that an index sends to it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune import statistics
from jprune.annotations import Array, Float, Shaped
from jprune.errors import JpruneError
from jprune.sorted_rows import Sorted
from jprune.trace.jaxpr import Var
from jprune.trace.views import Digit, all_digits, matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pick:
    """Which kernel of a stack each row is for: an array of indices."""

    index: Var
    shape: tuple[int, ...]
    """Of the indices; what the variable has beyond it is of size one."""
    count: int
    """Kernels in the stack."""
    clipped: bool
    """Whether an index beyond the stack means its first or last kernel; else it means none."""
    met: tuple[tuple[int, Digit], ...]
    """Axes of the indices that run along with digits of the value; over the others every row is used once for each."""
    summed: tuple[Digit, ...]
    """Digits of the value over which the matmul sums what the kernels give, as that of the experts of a token."""

    @property
    def variables(self) -> tuple[Var, ...]:
        """Values that it is read from."""
        return (self.index,)

    @property
    def digits(self) -> tuple[Digit, ...]:
        """Digits of the value that the indices run along with."""
        return tuple(digit for _, digit in self.met)

    def weights(self, digits: list[Digit], index: Any) -> Float[Array, "count rows"]:
        """How often each row, numbered by these digits of the value, goes to each kernel."""
        index = jnp.asarray(index).reshape(self.shape)
        index = jnp.clip(index, 0, self.count - 1) if self.clipped else index
        sent = index == jnp.arange(self.count, dtype=index.dtype).reshape(-1, *[1] * len(self.shape))
        kept = [axis for axis, _ in self.met]
        times = jnp.sum(sent, axis=[i + 1 for i in range(len(self.shape)) if i not in kept], dtype=jnp.float32)
        left = sorted(kept)  # axes of `times` behind the first
        where = {digit: left.index(axis) + 1 for axis, digit in self.met}
        order = [where[d] for d in digits if d in where]
        times = times.transpose(0, *order).reshape(self.count, *[d.size if d in where else 1 for d in digits])
        return jnp.broadcast_to(times, (self.count, *[d.size for d in digits])).reshape(self.count, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Which kernel of a stack each row is for: so many rows for the first, so many for the second (`ragged_dot`)."""

    sizes: Var
    count: int
    digits = summed = ()

    @property
    def variables(self) -> tuple[Var, ...]:
        """Values that it is read from."""
        return (self.sizes,)

    def weights(self, digits: list[Digit], sizes: Any) -> Float[Array, "count rows"]:
        """One for the rows of each kernel, else zero."""
        stop = jnp.cumsum(jnp.asarray(sizes))
        row = jnp.arange(math.prod(d.size for d in digits), dtype=stop.dtype)
        return ((row >= (stop - sizes)[:, None]) & (row < stop[:, None])).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """What a convolution multiplies its filter with: at every place of the result, what is below the filter."""

    groups: int
    filters: tuple[int, ...]
    """Inputs of a group, then the filter's spatial sizes."""
    options: tuple[tuple[str, Any], ...]
    numbers: Any

    def __call__(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """[groups, tokens, inputs of a group, *filter]."""
        lhs = self.numbers.lhs_spec
        spatial = "DHWXYZ"[-(len(lhs) - 2) :] if len(lhs) > 2 else ""
        plain = ("NC" + spatial, "OI" + spatial, "NC" + spatial)
        options = dict(self.options)
        x = jnp.asarray(x).transpose(lhs)
        patches = jax.lax.conv_general_dilated_patches(
            x.astype(jnp.float32),
            self.filters[1:],
            options["window_strides"],
            options["padding"],
            lhs_dilation=options["lhs_dilation"],
            rhs_dilation=options["rhs_dilation"],
            dimension_numbers=plain,
            precision=jax.lax.Precision.HIGHEST,
        )  # [N, inputs * filter, *places], inputs major
        patches = patches.reshape(len(x), self.groups, *self.filters, -1)
        last = patches.ndim - 1
        return patches.transpose(1, 0, last, *range(2, last)).reshape(self.groups, -1, *self.filters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """What a matmul reads: a value, and the digits of its index that number the input features."""

    value: Var
    columns: tuple[Digit, ...]
    """In the order of the kernel's inputs."""
    batch: tuple[Digit, ...] = ()
    """The digits that number the kernels of a stack."""
    rows: Pick | Rows | None = None
    """Which kernel of another stack each row is for."""
    patches: Patches | None = None

    @property
    def variables(self) -> tuple[Var, ...]:
        """Values that it is read from."""
        return (self.value, *(self.rows.variables if self.rows else ()))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stacks of kernels: those that rows are sent to, then those with rows of their own."""
        sent = (self.rows.count,) if self.rows else ()
        return (*sent, math.prod(d.size for d in self.batch)) if self.batch else sent

    @property
    def d_in(self) -> int:
        """Number of input features."""
        return math.prod(d.size for d in self.columns)

    def matrix(self, x: Any, *others: Any) -> Shaped[Array | np.ndarray, "*stack tokens d_in"]:
        """The matrix view of the value: features in the order of the kernel's; for a stack, one for each kernel.

        Rows that an index sends to a kernel are there as often as it does, and zero for the others, so that sums of
        products are right; numbers of tokens are not.
        """
        rows = self._rows(x)
        if self.rows is None:
            return rows
        sent = [self._sent(x, rows, times) for times in self.rows.weights(self._numbered(x), *others)]
        weighted = jnp.stack([own * jnp.sqrt(times)[:, None].astype(own.dtype) for own, times in sent])
        return weighted.reshape(-1, *weighted.shape[-2:])

    def sorted(self, x: Any, *others: Any) -> "Sorted | Shaped[Array | np.ndarray, '*stack tokens d_in']":
        """As `matrix`, but that rows which are sorted by their kernel are there once."""
        if isinstance(self.rows, Rows) and not self.batch:
            return Sorted(self._rows(x), *others)
        return self.matrix(x, *others)

    def update(self, kind: Any, values: tuple[Any, ...], weights: Any = None, name: str = "") -> Any:
        """A statistic of the values, every field with the axes of `stack` in front.

        Args:
          kind: its class.
          values: of `variables`.
          weights: of tokens, as many axes as the value has in front of its features, or fewer; all count if None.
          name: of the kernel, for messages.
        """
        x, *others = values
        rows = self._rows(x)
        shared = None if weights is None else self._weights(x, jnp.asarray(weights), name)
        zero = statistics.zeros(kind, self.d_in, *self.stack[1 if self.rows else 0 :])

        def seen(rows: Any, times: Any) -> Any:
            found = zero.update(rows) if times is None else statistics.update(zero, rows, times)
            return found.each if self.batch else found

        if self.rows is None:
            return seen(rows, shared)
        times = self.rows.weights(self._numbered(x), *others)
        times = times if shared is None else times * shared
        return jax.lax.map(lambda own: seen(*self._sent(x, rows, own)), times)

    def _sent(self, x: Any, rows: Any, times: Any) -> tuple[Any, Any]:
        """The rows that one kernel of the stack reads, and how often; added up where the matmul does so."""
        summed = self.rows.summed if self.rows else ()
        if not summed:
            return rows, times
        digits = self._numbered(x)
        axes = [i for i, d in enumerate(digits) if d in summed]
        times = times.reshape([d.size for d in digits])
        shape = (*rows.shape[:-2], *times.shape, rows.shape[-1])
        front = rows.ndim - 2
        added = jnp.sum(rows.reshape(shape) * times[..., None].astype(rows.dtype), axis=[front + i for i in axes])
        counted = jnp.any(times > 0, axis=axes).astype(jnp.float32).reshape(-1)
        return added.reshape(*rows.shape[:-2], -1, rows.shape[-1]), counted

    def _rows(self, x: Any) -> Any:
        x = x if self.patches is None else self.patches(x)
        if not self.batch:
            return matrix(x, self.columns)
        count = math.prod(d.size for d in self.batch)
        rows = matrix(x, (*self.batch, *self.columns))
        return rows.reshape(len(rows), count, -1).swapaxes(0, 1)

    def _numbered(self, x: Any) -> list[Digit]:
        """The digits that number the rows, in their order."""
        given = (*self.columns, *self.batch, *(self.rows.digits if self.rows else ()))
        digits = [d for axis, size in enumerate(x.shape) for d in all_digits(axis, size, given)]
        return [d for d in digits if d not in self.columns and d not in self.batch]

    def _weights(self, x: Any, weights: Any, name: str) -> Float[Array, " rows"]:
        """The weight of every row."""
        left = [d for d in self._numbered(x) if d.size > 1]
        sizes = [d.size for d in left]
        given = [n for n in weights.shape if n > 1]
        if self.patches is None and sizes[:1] == [math.prod(given)]:
            given = sizes[:1]
        if self.patches is not None or sizes[: len(given)] != given:
            shape = x.shape if self.patches is None else "patches of a convolution"
            raise JpruneError(
                f"{name}: weights of shape {weights.shape} do not say which of its inputs ({shape}) count; leave it "
                "out with `where`, or give no weights"
            )
        spread = weights.reshape(*given, *[1] * (len(sizes) - len(given)))
        return jnp.broadcast_to(spread, sizes).reshape(-1).astype(jnp.float32)
