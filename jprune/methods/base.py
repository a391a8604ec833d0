"""What every method that sets weights to zero is: a frozen config that prunes one kernel, and says what that costs."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jprune import evidence, masks
from jprune.annotations import Array, Bool, Float
from jprune.patterns import Pattern, Scope, known
from jprune.solvers.pruned import Pruned
from jprune.statistics import Statistic
from jprune.trees import check_floating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How one kernel is pruned, given what is known of its inputs."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What must be gathered over the calibration tokens; None for methods that need no data."""

    @abc.abstractmethod
    def __call__(
        self,
        kernel: Float[Array, "d_in d_out"],
        statistic: Statistic | None,
        pattern: Pattern,
        keep: Bool[Array, "d_in d_out"] | None = None,
    ) -> Pruned:
        """Prunes one kernel (matrix view); elements where `keep` is False were pruned before and stay zero."""

    def needs_axes(self, pattern: Pattern) -> bool:
        """Whether it matters to the result which axes of a kernel are its inputs; by default it does."""
        del pattern
        return True

    def together(
        self,
        kernels: Mapping[str, Float[Array, "d_in _"]],
        statistic: Statistic | None,
        patterns: Mapping[str, Pattern],
        keeps: Mapping[str, Bool[Array, "d_in _"]],
    ) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, by name; for methods that share work between them."""
        if self.statistic is not None:
            evidence.check(statistic, ", ".join(kernels))
        return {name: self(kernel, statistic, patterns[name], keeps.get(name)) for name, kernel in kernels.items()}

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations that pruning takes, without those of the statistic; by default of scores and a sort of them.

        Args:
          d_in: inputs.
          d_out: outputs, of all kernels that read the same input: `together` prunes them side by side.
        """
        return 30.0 * d_in * d_out

    def nbytes(self, d_in: int, d_out: int) -> float:
        """Bytes that pruning takes at most, results included and the statistic not; sizes as for `flops`.

        By default seven float32 copies of the kernels: the old and new weights, scores, and what finding a threshold
        takes. It is a bound for methods whose program cannot be compiled to ask for it, or before that is worth while.
        """
        return 7 * 4.0 * d_in * d_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByScore(Method):
    """A method that keeps the elements with the highest scores, and updates no weight.

    A new one defines `score`, for all of JAX's dtypes of kernels and in a form that `jax.jit` can trace.
    """

    per: ClassVar[Scope] = "output"
    """Where scores compete, if the pattern leaves it open."""

    @abc.abstractmethod
    def score(self, kernel: Float[Array, "d_in d_out"], statistic: Any) -> Float[Array, "d_in d_out"]:
        """Importance of each element of a kernel (matrix view), float32; higher = keep."""

    def needs_axes(self, pattern: Pattern) -> bool:
        """Whether the score depends on inputs, or the pattern does where scores compete as they do here."""
        return self.statistic is not None or known(pattern).among(self.per).by_input

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """Prunes one kernel, see `Method`; the score is compiled once for each shape."""
        check_floating(kernel, "kernel")
        pattern = known(pattern).among(self.per)
        return masked(kernel, masks.select(_score(self, kernel, statistic), pattern, keep=keep))


@functools.partial(jax.jit, static_argnums=0)
def _score(method: ByScore, kernel: Any, statistic: Any) -> Array:
    return method.score(kernel, statistic)


def masked(kernel: Float[Array, "d_in d_out"], mask: Bool[Array, "d_in d_out"]) -> Pruned:
    """What a method without weight update returns."""
    return Pruned(jnp.where(mask, kernel, jnp.zeros_like(kernel)), mask)
