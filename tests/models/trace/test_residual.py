"""What a block writes to its residual stream through: multiplied by z, the block is there or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.trace.coupling.residual import Outlet, outlets

X = jax.random.normal(jax.random.key(0), (3, 4))


def params(**shapes):
    return {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}


def check(f, p, expected):
    """f with the outlets at zero is the identity, and with all at one half adds half of each addend."""
    found = outlets(f, p, X)
    assert {w.path: w.offset for w in found} == expected

    def scaled(z):
        return p | {w.path: z * (p[w.path] + w.offset) - w.offset for w in found}

    np.testing.assert_array_equal(f(scaled(0.0), X), X)
    np.testing.assert_allclose(f(scaled(1.0), X), f(p, X), rtol=1e-6)
    assert np.abs(f(p, X) - X).max() > 0.1
    return scaled(0.5)


def test_sequential_with_bias():
    def f(p, x):
        x = x + jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"]
        return x + 0.5 * (jnp.tanh(x @ p["c"]) @ p["d"])

    p = params(a=(4, 5), b=(5, 4), bias=(4,), c=(4, 6), d=(6, 4))
    half = check(f, p, {"b": 0.0, "bias": 0.0, "d": 0.0})
    y = X + 0.5 * (jax.nn.relu(X @ p["a"]) @ p["b"] + p["bias"])
    np.testing.assert_allclose(f(half, X), y + 0.25 * (jnp.tanh(y @ p["c"]) @ p["d"]), rtol=1e-5)


def test_norm_after_with_an_offset_and_gates():
    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1.0 + scale)

    def f(p, x):
        mixed = jnp.einsum("etd,te->td", jnp.einsum("td,edf->etf", jnp.tanh(x), p["experts"]), x[:, :2])
        gated = jax.nn.sigmoid(x @ p["gate"])[:, None] * (x @ p["shared"])
        return x + norm(x @ p["a"], p["scale"]) + (mixed + gated)

    p = params(a=(4, 4), scale=(4,), experts=(2, 4, 4), gate=(4,), shared=(4, 4))
    half = check(f, p, {"scale": 1.0, "experts": 0.0, "shared": 0.0})
    np.testing.assert_allclose(f(half, X), X + 0.5 * (f(p, X) - X), rtol=1e-5)


def test_refusals():
    p = params(a=(4, 4))
    with pytest.raises(JpruneError, match="its output is its input and something more"):
        outlets(lambda p, x: jnp.tanh(x + x @ p["a"]), p, X)
    with pytest.raises(JpruneError, match="its output is its input and something more"):
        outlets(lambda p, x: x @ p["a"], p, X)
    with pytest.raises(JpruneError, match="linear in some parameter; here tanh"):
        outlets(lambda p, x: x + jnp.tanh(x @ p["a"]), p, X)
    assert outlets(lambda p, x: x + x @ p["a"], p, X) == (Outlet(path="a"),)
