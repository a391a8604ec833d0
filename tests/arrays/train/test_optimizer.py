"""AdamW against NumPy, schedules against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jprune.errors import JpruneError
from jprune.train.optimizer import AdamW


def numpy_adamw(p, gradients, rates, *, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, clip=0.0):
    """Algorithm 2 of the paper, with clipping by the global norm."""
    m = v = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
        norm = np.sqrt((g**2).sum())
        if clip and norm > clip:
            g = g * clip / norm
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_adamw(rng, clip):
    p, gradients = rng.standard_normal((3, 4)), rng.standard_normal((12, 3, 4))
    config = AdamW(learning_rate=0.05, schedule="cosine", warmup=3, weight_decay=0.2, b1=0.8, b2=0.95, clip=clip)
    tx = config.transformation(12)
    params = jnp.asarray(p, jnp.float32)
    state = tx.init(params)
    for g in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
            updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    rise, t = 0.05 * np.arange(1, 4) / 4, np.arange(9)
    rates = [*rise, *(0.05 * (1 + np.cos(np.pi * t / 9)) / 2)]
    np.testing.assert_allclose([config.rate(12)(i) for i in range(12)], rates, rtol=1e-5)
    want = numpy_adamw(p, gradients, rates, b1=0.8, b2=0.95, decay=0.2, clip=clip)
    np.testing.assert_allclose(params, want, rtol=1e-4, atol=1e-5)


def test_schedules():
    linear = AdamW(learning_rate=1.0, warmup=2).rate(6)
    np.testing.assert_allclose([linear(i) for i in range(7)], [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    floor = AdamW(learning_rate=2.0, schedule="cosine", warmup=0, floor=0.1).rate(4)
    np.testing.assert_allclose([floor(i) for i in (0, 2, 4)], [2.0, 1.1, 0.2], rtol=1e-5)
    lowered = AdamW(learning_rate=2.0, warmup=0, floor=0.5).rate(4)
    np.testing.assert_allclose([lowered(i) for i in (0, 2, 4)], [2.0, 1.5, 1.0], rtol=1e-5)
    constant = AdamW(learning_rate=2.0, schedule="constant", warmup=0).rate(3)
    assert [float(constant(i)) for i in range(3)] == [2, 2, 2]
    default = AdamW(learning_rate=1.0)
    assert float(default.rate(5)(0)) == 1  # too short for a warm-up
    np.testing.assert_allclose(default.rate(50)(0), 1 / 6, rtol=1e-6)  # five steps of it
    np.testing.assert_allclose(default.rate(10_000)(0), 1 / 101, rtol=1e-6)
    np.testing.assert_allclose(AdamW(learning_rate=1.0, most_warmup=None).rate(3200)(0), 1 / 321, rtol=1e-4)


def test_bad_options():
    for options, message in [
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"warmup": -1}, "cannot be negative"),
        ({"b1": 1.0}, "b1 1.0"),
        ({"floor": 1.5}, "share of its highest"),
    ]:
        with pytest.raises(JpruneError, match=message):
            AdamW(**options)
    with pytest.raises(JpruneError, match="a warm-up of 10 steps leaves none of the 10"):
        AdamW(warmup=10).rate(10)
