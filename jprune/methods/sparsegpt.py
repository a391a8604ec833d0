"""SparseGPT (Frantar and Alistarh 2023): the config; equations and deviations are in `jprune.solvers.sparsegpt`."""

import dataclasses
from typing import ClassVar

from jprune import devices, evidence
from jprune.errors import JpruneError
from jprune.methods.base import Refits
from jprune.solvers.pruned import Pruned
from jprune.solvers.sparsegpt import check_factor, factorise, sweep
from jprune.statistics import Gram, Statistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(Refits):
    """Prune column by column and update what is left to keep the outputs (Frantar and Alistarh 2023)."""

    statistic: ClassVar[type[Statistic]] = Gram

    damping: float = 0.01
    """Share of the Gram matrix's mean diagonal that is added to its diagonal."""
    block_size: int = 128
    """Inputs whose mask is chosen together."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damping < float("inf"):
            raise JpruneError(f"damping must be positive, got {self.damping}")
        if self.block_size < 1:
            raise JpruneError(f"block_size must be at least 1, got {self.block_size}")

    def __call__(self, kernel, statistic, pattern, keep=None) -> Pruned:
        """Prunes one kernel; `statistic` is a `Gram`, see `Method`."""
        keeps = {} if keep is None else {"kernel": keep}
        return self.together({"kernel": kernel}, statistic, {"kernel": pattern}, keeps)["kernel"]

    def together(self, kernels, statistic, patterns, keeps) -> dict[str, Pruned]:
        """Prunes kernels that read the same input, with one factorisation and one sweep over all outputs."""
        names = ", ".join(kernels)
        evidence.check_seen(statistic, names)
        factor = devices.on_one_device(factorise, statistic.total, self.damping)
        check_factor(factor, statistic.total, names)
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
