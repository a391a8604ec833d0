"""DLP: a block is the less important, the higher its median score (Chen et al. 2025), https://arxiv.org/abs/2505.23807.

With q_l the median of the scores |W_ij| ||x_i|| of all kernels of block l, its importance is 1 - q_l / sum q; densities
follow it within a band of 0.15 on either side of the mean. Of an even number of scores, the lower of the two in the
middle is taken, as PyTorch does.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from jprune import masks
from jprune.allocations.base import Allocation
from jprune.annotations import Array, Float
from jprune.methods.base import ByScore
from jprune.methods.wanda import Wanda


def median(scores: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The median of all scores, found by counting."""
    flat = jnp.concatenate([x.reshape(-1) for x in scores])
    half = masks.smallest_of_all(flat, (flat.size + 1) // 2)
    return jnp.max(jnp.where(half, flat, -jnp.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLP(Allocation):
    """Denser where the median of the scores is lower (Chen et al. 2025)."""

    by: ClassVar[ByScore] = Wanda()

    band: float = 0.15

    def score(self, scores):
        """The median."""
        return median(scores)

    def importance(self, scores):
        """One less the share of the sum of all medians."""
        return 1 - scores / scores.sum() if scores.sum() > 0 else scores
