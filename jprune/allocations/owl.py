"""OWL: a block is as important as it has outliers (Yin et al. 2023, eq. 1 and 2), https://arxiv.org/abs/2310.05175.

D_l is the share of the scores |W_ij| ||x_i|| of all kernels of block l that are above m times their mean; densities
follow it within a band of 0.08 on either side of the mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from jprune.allocations.base import Allocation
from jprune.annotations import Array, Float
from jprune.errors import JpruneError
from jprune.methods.base import ByScore
from jprune.methods.wanda import Wanda


def outliers(scores: Sequence[Float[Array, "..."]], m: float) -> Float[Array, ""]:
    """The share of all scores that are above `m` times their mean."""
    size = float(sum(x.size for x in scores))
    mean = jnp.sum(jnp.stack([jnp.sum(x) for x in scores])) / size
    # Of each kernel as a whole number, and as float32 only where they are added up.
    above = jnp.stack([jnp.sum(x > m * mean, dtype=jnp.int32) for x in scores])
    return jnp.sum(above.astype(jnp.float32)) / size


@dataclasses.dataclass(frozen=True, kw_only=True)
class OWL(Allocation):
    """Denser where more scores are outliers (Yin et al. 2023)."""

    by: ClassVar[ByScore] = Wanda()

    m: float = 5.0
    """How many times the mean of its block a score must be to be an outlier."""
    band: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.m > 0:
            raise JpruneError(f"m must be positive: how many times the mean an outlier is; got {self.m}")

    def score(self, scores):
        """The share of outliers."""
        return outliers(scores, self.m)

    def importance(self, scores):
        """The shares as they are."""
        return scores
