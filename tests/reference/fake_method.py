"""A method that costs next to nothing: what runs do around a method is tested with it, instead of with a solver."""

import dataclasses

import jax
import jax.numpy as jnp

from jprune.methods import Method, masked
from jprune.statistics import SquaredNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOther(Method):
    """Keeps every other input, times what tells its activations from others: a run that loses its way shows it."""

    statistic = SquaredNorm

    scale: float = 1.0

    def __call__(self, kernel, statistic, pattern, keep=None):
        return _every_other(kernel, statistic.total, self.scale)


@jax.jit
def _every_other(kernel, total, scale):
    mask = jnp.broadcast_to(jnp.arange(len(kernel))[:, None] % 2 == 0, kernel.shape)
    return masked(kernel * (scale * total / (1 + total))[:, None], mask)
