"""ALPS (Meng et al. 2024): the config; equations and deviations are in `jprune.solvers.alps`."""

import dataclasses
from typing import ClassVar

from jprune.methods.solving import Splits
from jprune.solvers.alps import EVERY, USUAL, find_masks
from jprune.solvers.splitting import Find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alps(Splits):
    """Prune by ADMM until the mask stands by itself, and solve for what is left (Meng et al. 2024)."""

    find: ClassVar[Find] = staticmethod(find_masks)

    iterations: int = 300
    """Of ADMM, at most, each with a product with a matrix of the inputs, and every third with an inverse; the masks of
    language models settle after about 30."""

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations of inverses, which all kernels share, and of as many iterations as it usually takes."""
        iterations = min(self.iterations, USUAL)
        return self.rounds_flops(d_in, d_out, -(-iterations // EVERY), iterations)
