"""SparseGPT (Frantar and Alistarh 2023): the config; equations and deviations are in `jprune.solvers.sparsegpt`."""

import dataclasses

from jprune.errors import JpruneError
from jprune.methods.solving import Solves
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(Solves):
    """Prune column by column and update what is left to keep the outputs (Frantar and Alistarh 2023)."""

    block_size: int = 128
    """Inputs whose mask is chosen together."""

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < 1:
            raise JpruneError(f"block_size must be at least 1, got {self.block_size}")

    def solved(self, kernels, statistic, factor, patterns, keeps) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, in one sweep over all outputs."""
        pruned = sweep(
            list(kernels.values()),
            factor,
            [patterns[name] for name in kernels],
            [keeps.get(name) for name in kernels],
            block_size=self.block_size,
        )
        return self.refitted(kernels, statistic, dict(zip(kernels, pruned, strict=True)), factor.damping)

    def flops(self, d_in: int, d_out: int) -> float:
        """Operations of one factorisation, which all kernels share, of the sweep over all outputs, and of `refit`."""
        return d_in**3 / 3 + d_in * d_in * d_out + self.refit_flops(d_in, d_out)

    def nbytes(self, d_in: int, d_out: int) -> float:
        """Bytes of four copies of the Gram matrix (damped, reversed, factorised, padded) and of the sweep."""
        return 4 * 4.0 * d_in * d_in + super().nbytes(d_in, d_out)
