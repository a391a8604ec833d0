"""Scores against NumPy."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpy_scores
import pytest

from jprune import scores
from jprune.statistics import SquaredNorm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_magnitude(rng, dtype):
    kernel = jnp.asarray(rng.normal(size=(7, 5)), dtype)
    result = scores.magnitude(kernel)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, numpy_scores.magnitude(kernel))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wanda(rng, dtype):
    kernel = jnp.asarray(rng.normal(size=(7, 5)), dtype)
    x = jnp.asarray(rng.normal(size=(30, 7)) * [0, 1e-3, 1, 1, 2, 3, 1e3], dtype)
    result = scores.wanda(kernel, SquaredNorm.zeros(7).update(x).total)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, numpy_scores.wanda(kernel, x), rtol=1e-5)


def test_wanda_does_not_depend_on_the_number_of_sequences(rng):
    """The authors divide the squared norm by it: one factor for all scores."""
    kernel, total = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), jnp.asarray(rng.uniform(size=7), jnp.float32)
    np.testing.assert_array_equal(scores.wanda(kernel, total / 16) * 4, scores.wanda(kernel, total))


def test_shapes_are_checked_here():
    """conftest.py looks for what to check and says nothing if it finds too little."""
    with pytest.raises(jaxtyping.TypeCheckError, match="squared_norm"):
        scores.wanda(jnp.ones((3, 2)), jnp.ones(2))
