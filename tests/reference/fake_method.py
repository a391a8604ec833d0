"""A method that costs next to nothing: what runs do around a method is tested with it, instead of with a solver."""

import dataclasses

import jax
import jax.numpy as jnp

from jprune.cross_gram import CrossGram
from jprune.methods import Method, masked
from jprune.statistics import SquaredNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOther(Method):
    """Keeps every other input, times what tells its activations from others: a run that loses its way shows it."""

    statistic = SquaredNorm

    scale: float = 1.0

    def __call__(self, kernel, statistic, pattern, keep=None):
        return _every_other(kernel, statistic.total, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOtherOfTwo(Method):
    """The same, and by how far the dense model's activations are from its own, and its residual stream."""

    statistic = CrossGram

    def __call__(self, kernel, statistic, pattern, keep=None):
        own = jnp.abs(jnp.diagonal(statistic.total))
        far = jnp.abs(jnp.sum(statistic.apart, axis=1))
        if statistic.residual is not None:
            far = far + jnp.abs(jnp.sum(statistic.residual, axis=1))
        return _every_other(kernel, own + 5 * far, 1.0)


@jax.jit
def _every_other(kernel, total, scale):
    mask = jnp.broadcast_to(jnp.arange(len(kernel))[:, None] % 2 == 0, kernel.shape)
    return masked(kernel * (scale * total / (1 + total))[:, None], mask)
