"""Wanda: weights are as important as they are large and their inputs are (Sun et al. 2023, eq. 1).

https://arxiv.org/abs/2306.11695. The score of W_ij is |W_ij| ||x_i||; scores compete among the inputs of an output. The
authors divide the squared norm by the number of sequences; that is one factor for the whole kernel and does not change
what is kept. Scores are float32 whatever the kernel's dtype.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jprune.annotations import Array, Float
from jprune.methods.base import ByScore
from jprune.patterns import Scope
from jprune.statistics import SquaredNorm, Statistic


def wanda(kernel: Float[Array, "d_in d_out"], squared_norm: Float[Array, "d_in"]) -> Float[Array, "d_in d_out"]:
    """|W_ij| ||x_i||, with ||x_i||^2 = `squared_norm[i]` summed over the calibration tokens.

    Weights of dead inputs, which were zero for every token, score 0 and go first.
    """
    norm = jnp.sqrt(squared_norm.astype(jnp.float32))
    return jnp.abs(kernel.astype(jnp.float32)) * norm[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(ByScore):
    """Prune the smallest |weight| x norm of its input, output by output (Sun et al. 2023). No weight update."""

    statistic: ClassVar[type[Statistic]] = SquaredNorm
    per: ClassVar[Scope] = "output"

    def score(self, kernel, statistic):
        """Absolute values, each times the norm of its input; `statistic` is a `SquaredNorm`."""
        return wanda(kernel, statistic.total)
