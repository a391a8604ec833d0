"""Sparsity that rises with depth along a line (Huang et al. 2025, ATP), https://arxiv.org/abs/2502.14770.

s_l = s + beta (l - (L - 1) / 2) for blocks l = 0, ..., L - 1. The authors look for beta by a few trials on held-out
text; here half of the line's rise, beta (L - 1) / 2, is the band, and it is given. Nothing is measured.
"""

import dataclasses

import numpy as np

from jprune.allocations.base import Allocation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Allocation):
    """Sparser with every block, by the same number (Huang et al. 2025)."""

    band: float = 0.1

    def importance(self, scores):
        """The fewer blocks come before, the higher."""
        return -np.arange(len(scores), dtype=np.float64)
