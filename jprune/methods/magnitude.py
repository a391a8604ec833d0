"""Magnitude pruning: the smallest weights go (Han et al. 2015, https://arxiv.org/abs/1506.02626).

Scores compete in the whole kernel, as in the baselines of SparseGPT and Wanda. They are float32 whatever the kernel's
dtype: comparing in half precision, as those baselines do, makes thousands of false ties.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jprune.annotations import Array, Float
from jprune.methods.base import ByScore
from jprune.patterns import Scope


def magnitude(kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
    """|W|."""
    return jnp.abs(kernel.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(ByScore):
    """Prune the smallest weights of each kernel. Needs no calibration data."""

    per: ClassVar[Scope] = "kernel"

    def score(self, kernel, statistic):
        """Absolute values; `statistic` is not used."""
        del statistic
        return magnitude(kernel)
