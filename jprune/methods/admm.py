"""ADMM pruning (Boža 2024): the config; equations and deviations are in `jprune.solvers.admm`."""

import dataclasses
from typing import ClassVar

from jprune.methods.solving import Splits
from jprune.solvers.admm import find_masks
from jprune.solvers.splitting import Find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Admm(Splits):
    """Prune by ADMM with a mask that closes step by step, and solve for what is left (Boža 2024)."""

    find: ClassVar[Find] = staticmethod(find_masks)

    iterations: int = 20
    """Of ADMM, each with a product with a matrix of the inputs; in the first three quarters the mask closes."""

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations of one inverse, which all kernels share, and of the iterations over all their outputs."""
        return self.rounds_flops(d_in, d_out, 1, self.iterations)
