"""Rows that are sorted by their kernel: products and sums of them, against a loop over kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import sorted_rows
from jprune.sorted_rows import Sorted
from jprune.statistics import Gram, SquaredNorm, Stacked

SIZES = np.array([300, 0, 1, 150, 0])
"""More rows than a tile has, none, one, and none for the last."""


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_row_meets_its_own_kernel(dtype, rng):
    """Kernels of another dtype than the rows are cast exactly; those without a row are not read."""
    x = rng.normal(size=(SIZES.sum(), 6)).astype(np.float32)
    kernels = jnp.asarray(rng.normal(size=(5, 6, 4)), dtype).at[jnp.array([1, 4])].set(jnp.nan)
    y = jax.jit(sorted_rows.dot)(x, kernels, jnp.asarray(SIZES))
    wide = np.asarray(kernels, np.float64)
    expected = [x[i] @ wide[e] for i, e in enumerate(np.repeat(np.arange(5), SIZES))]
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Gram, SquaredNorm])
def test_every_kernel_sees_its_own_rows(kind, rng):
    """Beside what it has seen before; rows of zeros add nothing and do not count."""
    x = rng.normal(size=(SIZES.sum(), 6)).astype(np.float32)
    x[[2, 310]] = 0
    before = Stacked.zeros(kind, 6, 5).update(jnp.asarray(rng.normal(size=(5, 7, 6)), jnp.float32))
    after = jax.jit(Stacked.update)(before, Sorted(jnp.asarray(x), jnp.asarray(SIZES)))
    np.testing.assert_array_equal(after.tokens, 7 + SIZES - [1, 0, 0, 1, 0])
    for e, own in enumerate(np.split(x.astype(np.float64), np.cumsum(SIZES)[:-1])):
        gram = own.T @ own
        added = after.of(e).total - before.of(e).total
        np.testing.assert_allclose(added, gram if kind is Gram else gram.diagonal(), rtol=1e-5, atol=1e-4)


def test_of_a_narrow_stack_one_kernel_is_cast_at_a_time():
    """XLA's CPU backend would hold all of it in float32 otherwise."""
    shapes = (((64, 32), jnp.float32), ((128, 32, 32), jnp.bfloat16), ((128,), jnp.int32))
    compiled = jax.jit(sorted_rows.dot).lower(*(jax.ShapeDtypeStruct(*own) for own in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 32 * 32
