"""Hard concrete masks against numbers computed by hand, NumPy, and many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.train.shearing import hard_concrete


def numpy_mask(u, log_alpha):
    """The published lines, in float64."""
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    return np.clip(s * 1.2 - 0.1, 0, 1)


def test_by_hand():
    """sigmoid(2/3 ln(1/11)) = 0.1682; sigmoid(1.2 log alpha); log 100 = 4.605."""
    zero = 1 - hard_concrete.expected(jnp.asarray([0.0, 1.0, -1.0]))
    by_hand = [1 / (1 + 11 ** (2 / 3) * np.exp(x)) for x in (0, 1, -1)]
    np.testing.assert_allclose(zero, by_hand, rtol=1e-5)
    assert zero[0] == pytest.approx(0.168, abs=5e-4)
    np.testing.assert_allclose(hard_concrete.soft(jnp.asarray([0.0, 2.0])), [0.5, 1 / (1 + np.exp(-2.4))], rtol=1e-6)
    np.testing.assert_allclose(hard_concrete.clamp(jnp.asarray([9.0, -9.0, 1.0])), [4.60517, -4.60517, 1.0], rtol=1e-6)
    np.testing.assert_allclose(hard_concrete.initial((2, 3)), np.full((2, 3), np.log(100)), rtol=1e-6)


def test_samples_are_those_of_numpy():
    log_alpha = jnp.linspace(-4.6, 4.6, 7)[:, None] * jnp.ones((7, 50))
    key = jax.random.key(3)
    u = np.asarray(jax.random.uniform(key, (7, 50), jnp.float32, 1e-6, 1 - 1e-6), np.float64)
    z = hard_concrete.sample(log_alpha, key)
    np.testing.assert_allclose(z, numpy_mask(u, np.asarray(log_alpha, np.float64)), atol=2e-5)
    assert np.any(z == 0)
    assert np.any(z == 1)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_expected_is_how_often_a_mask_is_not_zero(log_alpha):
    n = 200_000
    z = hard_concrete.sample(jnp.full(n, log_alpha), jax.random.key(1))
    share = float(np.mean(np.asarray(z) > 0))
    p = float(hard_concrete.expected(jnp.asarray(log_alpha)))
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)  # five standard deviations
    u = np.random.default_rng(0).random(n)
    assert abs(np.mean(numpy_mask(u, log_alpha) > 0) - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_gradients_reach_log_alpha():
    f = lambda a, key: hard_concrete.sample(a, key).sum()  # noqa: E731
    a, key = jnp.zeros(100), jax.random.key(0)
    g = jax.grad(f)(a, key)
    z = hard_concrete.sample(a, key)
    s = (np.asarray(z) + 0.1) / 1.2
    inside = (np.asarray(z) > 0) & (np.asarray(z) < 1)
    np.testing.assert_allclose(g, np.where(inside, 1.2 * s * (1 - s) * 1.5, 0), atol=1e-5)


def test_deterministic_keeps_the_largest():
    log_alpha = jnp.asarray([[3.0, -1.0, 3.0, 0.5], [-4.0, -4.0, -4.0, -4.0]])
    z = hard_concrete.deterministic(log_alpha, 2)
    np.testing.assert_array_equal(np.asarray(z) > 0, [[True, False, True, False], [True, True, False, False]])
    np.testing.assert_allclose(z[0, 0], 1 / (1 + np.exp(-3.6)), rtol=1e-6)
    assert np.all(hard_concrete.deterministic(log_alpha, 4) > 0)
