"""What methods have in common that solve for new weights by a Gram matrix: it is checked and factorised once for all
kernels that read one input, and damped as the factorisation needs it.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from jprune import devices, evidence
from jprune.annotations import Array, Bool, Float
from jprune.errors import JpruneError
from jprune.methods.base import Refits, check_statistic, of_dtypes
from jprune.patterns import Scope
from jprune.solvers import splitting
from jprune.solvers._sweep import Factor
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise
from jprune.statistics import Gram, Statistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solves(Refits):
    """A method that solves for kernels that read one input side by side."""

    statistic: ClassVar[type[Statistic]] = Gram
    solves: ClassVar[bool] = True
    per: ClassVar[Scope] = "block"

    damping: float = 0.01
    """Share of the Gram matrix's mean diagonal that is added to its diagonal."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise JpruneError(f"damping must be positive, got {self.damping}")

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """Prunes one kernel; `statistic` is a `Gram`, see `Method`."""
        keeps = {} if keep is None else {"kernel": keep}
        return self.together({"kernel": kernel}, statistic, {"kernel": pattern}, keeps)["kernel"]

    def together(self, kernels, statistic, patterns, keeps) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, with one factorisation for all of them."""
        check_statistic(self, kernels, statistic)
        names = ", ".join(kernels)
        evidence.check_seen(statistic, names)
        factor = devices.on_one_device(factorise, statistic.total, self.damping)
        check_factor(factor, statistic.total, names)
        solved = self.solved(self.aimed(kernels, statistic, factor), statistic, factor, patterns, keeps)
        return of_dtypes(solved, kernels)

    @abc.abstractmethod
    def solved(
        self,
        kernels: Mapping[str, Float[Array, "d_in _"]],
        statistic: Gram,
        factor: Factor,
        patterns: Mapping[str, Any],
        keeps: Mapping[str, Bool[Array, "d_in _"]],
    ) -> dict[str, Pruned]:
        """Prunes them with what is factorised, and refits them; see `Method.together`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits(Solves):
    """A method that looks for masks as `jprune.solvers.splitting` does, and then solves for the weights under them."""

    per: ClassVar[Scope] = "kernel"
    find: ClassVar[splitting.Find]
    """Finds masks; takes `iterations` too."""

    refit: int = 10
    """Steps of conjugate gradients that solve for the weights once their mask stands."""

    iterations: int
    """Iterations."""

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise JpruneError(f"iterations must be at least 1, got {self.iterations}")

    def solved(self, kernels, statistic, factor, patterns, keeps):
        """Finds the masks side by side, and then the weights."""
        find = functools.partial(type(self).find, iterations=self.iterations)
        return splitting.solve(kernels, statistic.total, factor.damping, patterns, keeps, find, steps=self.refit)

    def rounds_flops(self, d_in: int, d_out: int, inverses: int, iterations: int) -> float:
        """Operations of factorising, of inverses and iterations, and of `refit`."""
        each = 2.0 * d_in**2 * d_out
        return d_in**3 / 3 + inverses * 10 / 3 * d_in**3 + (iterations + 1) * each + self.refit_flops(d_in, d_out)

    def nbytes(self, d_in: int, d_out: int) -> float:
        """Bytes of seven matrices of the inputs (damped, scaled, factorised, P and between) and of iterations."""
        return 4.0 * (7 * d_in**2 + 14 * d_in * d_out) + self.target_bytes(d_in, d_out)
