"""Hard concrete masks: random numbers in [0, 1] that are exactly 0 or 1 with a probability that has a gradient.

Louizos, Welling and Kingma (arXiv:1712.01312), equations 10 to 13, with the constants of LLM-Shearing's program: a
uniform number u goes through a sigmoid with the location `log_alpha`, is stretched to (-0.1, 1.1) and cut to [0, 1].

What differs from that program: nothing in the numbers. There log alpha starts at N(5, 0.01) and is cut to
log 100 = 4.605 before it is first used, so it always starts at log 100; here it is said so.
"""

import math

import jax
import jax.numpy as jnp

from jprune.annotations import Array, Float, Key

LOW, HIGH = -0.1, 1.1
"""To which a number in (0, 1) is stretched before it is cut."""
TEMPERATURE = 2 / 3
SHARPNESS = 0.8
"""By which log alpha is multiplied where nothing is drawn."""
EPSILON = 1e-6
"""How far u stays away from 0 and 1, and probabilities do."""
BOUND = math.log(100)
"""log alpha stays in [-BOUND, BOUND]: the mask is 0 with a probability of 0.2 % at least, and 95 % at most."""


def initial(shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The log alpha to begin with: as likely kept as can be."""
    return jnp.full(shape, BOUND, jnp.float32)


def clamp(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """Within its bounds."""
    return jnp.clip(log_alpha, -BOUND, BOUND)


def sample(log_alpha: Float[Array, "..."], key: Key[Array, ""]) -> Float[Array, "..."]:
    """A mask z in [0, 1] of the shape of `log_alpha`; many of its numbers are exactly 0 or 1."""
    u = jax.random.uniform(key, log_alpha.shape, log_alpha.dtype, EPSILON, 1 - EPSILON)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / TEMPERATURE)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)


def expected(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """The probability that a mask is not 0: how much of a unit is expected to stay."""
    zero = jax.nn.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha)
    return 1.0 - jnp.clip(zero, EPSILON, 1 - EPSILON)


def soft(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """The mask where nothing is drawn: sigmoid(0.8 log_alpha / T), between 0.4 % and 99.6 %."""
    return jax.nn.sigmoid(log_alpha / TEMPERATURE * SHARPNESS)


def deterministic(log_alpha: Float[Array, "*rows n"], kept: int | Float[Array, "*rows 1"]) -> Float[Array, "*rows n"]:
    """`soft` for the `kept` largest of each row, and 0 for all others; of equal ones the first stay."""
    rank = jnp.argsort(jnp.argsort(-log_alpha, axis=-1, stable=True), axis=-1)
    return jnp.where(rank.astype(jnp.float32) < kept, soft(log_alpha), jnp.zeros((), log_alpha.dtype))
