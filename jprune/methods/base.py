"""What every method that sets weights to zero is: a frozen config that prunes one kernel, and says what that costs."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jprune import devices, evidence, masks
from jprune.annotations import Array, Bool, Float, Shaped
from jprune.cross_gram import CrossGram
from jprune.errors import JpruneError
from jprune.patterns import NM, Pattern, Scope, known
from jprune.solvers._sweep import Factor
from jprune.solvers.pruned import Pruned
from jprune.solvers.refit import DAMPING, refit
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.solvers.targets import check_strength, towards_dense
from jprune.statistics import Gram, SquaredNorm, Statistic
from jprune.trees import check_floating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """How one kernel is pruned, given what is known of its inputs."""

    statistic: ClassVar[type[Statistic] | None] = None
    """What must be gathered over the calibration tokens; None for methods that need no data."""
    per: ClassVar[Scope] = "output"
    """Where scores compete, if the pattern leaves it open."""
    timed: ClassVar[Pattern] = NM(1, 2)
    """A pattern that the method is timed with, for forecasts."""

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
        check_statistic(self, kernels, statistic)
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
class Refits(Method):
    """A method whose result can be solved for once more, with its mask as it is: see `jprune.solvers.refit`."""

    refit: int = 0
    """Steps of conjugate gradients, after the mask is chosen, towards the outputs of the kernel before pruning; 10
    come close to the best weights of the mask. Needs the Gram matrix of the inputs."""

    dense_targets: float = 0.0
    """How far to solve towards what the dense model gives, where the inputs of a kernel have errors of the layers
    before: from 0, not at all, to 1. The dense model is computed beside the pruned one. Methods that
    solve for no weights themselves need `refit` for it."""

    solves: ClassVar[bool] = False
    """Whether the method solves for weights without `refit` too."""

    def __post_init__(self):
        if self.refit < 0:
            raise JpruneError(f"refit must be a number of steps, 0 or more; got {self.refit}")
        check_strength(self.dense_targets, "dense_targets")
        if self.dense_targets and not (self.refit or self.solves):
            raise JpruneError(
                f"dense_targets={self.dense_targets:g} says what weights are solved towards, and "
                f"{type(self).__name__} without refit solves for none; give refit=10 too, or dense_targets=0"
            )
        wanted = CrossGram if self.dense_targets else Gram if self.refit else None
        own = type(self).statistic
        if wanted and own is not None and not issubclass(own, Gram | SquaredNorm):
            option = "dense_targets" if self.dense_targets else "refit"
            raise JpruneError(
                f"{option} needs a Gram of the inputs, and {type(self).__name__} a {own.__name__}; only one "
                f"statistic is gathered: use {option}=0, or a method that needs a Gram, a SquaredNorm or nothing"
            )
        if wanted:  # who asks what is to be gathered asks the object, not its class
            object.__setattr__(self, "statistic", wanted)

    def aimed(
        self, kernels: Mapping[str, Shaped[Array, "d_in _"]], statistic: Any, factor: Factor
    ) -> dict[str, Shaped[Array, "d_in _"]]:
        """What to solve towards in place of kernels that read the same input: those themselves without `dense_targets`.

        Args:
          kernels: by name.
          statistic: a `CrossGram` of the input, if there are targets.
          factor: its Gram matrix, damped and factorised.
        """
        if not self.dense_targets:
            return dict(kernels)
        for name, kernel in kernels.items():
            check_floating(kernel, name)
        return towards_dense(kernels, factor, statistic.apart, self.dense_targets, statistic.residual)

    def refitted(
        self,
        kernels: Mapping[str, Float[Array, "d_in _"]],
        statistic: Any,
        pruned: Mapping[str, Pruned],
        damping: Float[Array, ""] | float = DAMPING,
    ) -> dict[str, Pruned]:
        """What was made of kernels that read the same input, after the steps of `refit`; the same if there are none.

        Args:
          kernels: as they were before, by name.
          statistic: a `Gram` of the input, if there are steps.
          pruned: what was made of each.
          damping: see `jprune.solvers.refit`.
        """
        if not self.refit:
            return dict(pruned)
        return {
            name: refit(
                kernels[name], statistic.total, own.mask, own.kernel, steps=self.refit, damping=damping, where=name
            )
            for name, own in pruned.items()
        }

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations of scores, and of `refit`."""
        factorising = d_in**3 / 3 if self.dense_targets else 0.0
        return super().flops(d_in, d_out) + factorising + self.refit_flops(d_in, d_out)

    def refit_flops(self, d_in: int, d_out: int) -> float:
        """A product with the Gram matrix for each step, and for the loss before and after; and those of targets."""
        targets = 2.0 * (d_in**3 + 2 * d_in**2 * d_out) if self.dense_targets else 0.0
        return targets + (2.0 * (self.refit + 2) * d_in**2 * d_out if self.refit else 0.0)

    def nbytes(self, d_in: int, d_out: int) -> float:
        """Bytes of scores, of the damped Gram matrix and the directions and residuals of the steps, and of targets."""
        steps = 4.0 * (2 * d_in**2 + 4 * d_in * d_out) if self.refit else 0.0
        return super().nbytes(d_in, d_out) + steps + self.target_bytes(d_in, d_out)

    def target_bytes(self, d_in: int, d_out: int) -> float:
        """Bytes of the targets and of what their residual is solved for, and of three matrices of the inputs."""
        return 4.0 * (3 * d_in**2 + 4 * d_in * d_out) if self.dense_targets else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByScore(Refits):
    """A method that keeps the elements with the highest scores, and updates no weight unless it is to `refit`.

    A new one defines `score`, for all of JAX's dtypes of kernels and in a form that `jax.jit` can trace.
    """

    @abc.abstractmethod
    def score(self, kernel: Float[Array, "d_in d_out"], statistic: Any) -> Float[Array, "d_in d_out"]:
        """Importance of each element of a kernel (matrix view), float32; higher = keep.

        `statistic` is of the class that the class of the method names, also where a Gram is gathered for `refit`.
        """

    def needs_axes(self, pattern: Pattern) -> bool:
        """Whether the score depends on inputs, or the pattern does where scores compete as they do here."""
        return self.statistic is not None or known(pattern).among(self.per).by_input

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """Prunes one kernel, see `Method`; the score is compiled once for each shape."""
        check_statistic(self, {"kernel": kernel}, statistic)
        pruned = self._pruned(kernel, statistic, pattern, keep)
        return self._solved({"kernel": kernel}, statistic, {"kernel": pruned})["kernel"]

    def together(self, kernels, statistic, patterns, keeps) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, see `Method`: one by one."""
        check_statistic(self, kernels, statistic)
        if self.statistic is not None:
            evidence.check(statistic, ", ".join(kernels))
        pruned = {name: self._pruned(x, statistic, patterns[name], keeps.get(name)) for name, x in kernels.items()}
        return self._solved(kernels, statistic, pruned)

    def _solved(self, kernels: Mapping[str, Any], statistic: Any, pruned: Mapping[str, Pruned]) -> dict[str, Pruned]:
        """What was made of kernels, refitted towards the targets if there are any."""
        if not self.dense_targets:
            return self.refitted(kernels, statistic, pruned)
        factor = devices.on_one_device(factorise, statistic.total, DAMPING)
        check_factor(factor, statistic.total, ", ".join(kernels))
        aims = self.aimed(kernels, statistic, factor)
        return of_dtypes(self.refitted(aims, statistic, pruned, factor.damping), kernels)

    def _pruned(self, kernel: Any, statistic: Any, pattern: Any, keep: Any) -> Pruned:
        check_floating(kernel, "kernel")
        pattern = known(pattern).among(self.per)
        return masked(kernel, masks.select(_score(self, kernel, self._of_score(statistic)), pattern, keep=keep))

    def _of_score(self, statistic: Any) -> Any:
        """What `score` asks for, out of what is gathered."""
        own = type(self).statistic
        if own is None:
            return None
        if self.refit and not issubclass(own, Gram):
            return SquaredNorm(jnp.diagonal(statistic.total), statistic.tokens)
        return statistic


@functools.partial(jax.jit, static_argnums=0)
def _score(method: ByScore, kernel: Any, statistic: Any) -> Array:
    return method.score(kernel, statistic)


def check_statistic(method: Method, kernels: Mapping[str, Shaped[Array, "d_in _"]], statistic: Any) -> None:
    """Raises a `JpruneError` unless this is the statistic that a method needs, of as many inputs as the kernels have.

    Args:
      method: whose statistic it is to be.
      kernels: that read the same input, by name.
      statistic: of that input.
    """
    if method.statistic is None:
        return
    evidence.check_kind(statistic, method.statistic, ", ".join(kernels), type(method).__name__)
    for name, kernel in kernels.items():
        if kernel.shape[0] != statistic.d_in:
            raise JpruneError(f"{name}: expected a statistic of {kernel.shape[0]} inputs, got one of {statistic.d_in}")


def masked(kernel: Float[Array, "d_in d_out"], mask: Bool[Array, "d_in d_out"]) -> Pruned:
    """What a method without weight update returns."""
    return Pruned(jnp.where(mask, kernel, jnp.zeros_like(kernel)), mask)


def of_dtypes(pruned: Mapping[str, Pruned], kernels: Mapping[str, Shaped[Array, "d_in _"]]) -> dict[str, Pruned]:
    """What was made of float32 targets, in the dtypes of the kernels."""
    return {
        name: dataclasses.replace(own, kernel=own.kernel.astype(kernels[name].dtype)) for name, own in pruned.items()
    }
