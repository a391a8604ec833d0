"""Rotary embeddings against their definition; the scalings' values are compared with Hugging Face in test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.models.rope import Rope, frequencies, rotate, rotations


def test_rotation_is_a_complex_product(rng):
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 2, 100, 0]])
    turned = rotate(jnp.asarray(x), rotations(Rope(theta=100.0), 8, jnp.asarray(positions)))
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-5)


def test_bfloat16_is_turned_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 50, 1, 8)), jnp.bfloat16)
    turn = rotations(Rope(), 8, jnp.arange(1000, 1050))
    exact = rotate(x.astype(jnp.float32), turn)
    assert rotate(x, turn).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotate(x, turn), exact.astype(jnp.bfloat16))


def test_linear_stretches_positions():
    plain = rotations(Rope(), 8, jnp.arange(5))
    stretched = rotations(Rope(kind="linear", factor=4.0), 8, 4 * jnp.arange(5))
    np.testing.assert_allclose(stretched, plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_fast_pairs_are_kept_and_slow_ones_interpolated(kind):
    plain = frequencies(Rope(theta=5e5), 128)
    scaled = frequencies(Rope(kind=kind, theta=5e5, factor=8.0, context=8192), 128)
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[:10], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-10:], 8.0, rtol=1e-6)
    assert np.all(np.diff(ratio) >= -1e-5)


def test_dynamic_changes_only_beyond_the_context():
    dynamic = Rope(kind="dynamic", factor=2.0, context=16)
    run = jax.jit(lambda positions: rotations(dynamic, 8, positions))
    np.testing.assert_allclose(run(jnp.arange(16)), rotations(Rope(), 8, jnp.arange(16)), atol=1e-6)
    assert np.abs(np.subtract(run(jnp.arange(32)), rotations(Rope(), 8, jnp.arange(32)))).max() > 0.1


def test_unknown_kind_is_refused():
    with pytest.raises(JpruneError, match=r"'spiral'.*supported: default, linear"):
        Rope(kind="spiral")
