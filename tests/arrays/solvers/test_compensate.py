"""Compensation against exact least squares in NumPy float64, and what must cost nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.solvers import compensate

KEEP = np.arange(20) % 3 != 1


def problem(dependent=False):
    """A kernel and correlated inputs; if `dependent`, those that go are linear combinations of those that stay."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 20)) + 2 * rng.normal(size=(200, 4)) @ rng.normal(size=(4, 20))
    if dependent:
        x[:, ~KEEP] = x[:, KEEP] @ rng.normal(size=(KEEP.sum(), (~KEEP).sum()))
    return rng.normal(size=(20, 6)).astype(np.float32), x


def solve(kernel, x, keep=KEEP, **options):
    return compensate(jnp.asarray(kernel), jnp.asarray(x.T @ x, jnp.float32), keep, **options)


@pytest.mark.parametrize("damping", [0.01, 1e-6])
def test_is_exact_least_squares(damping):
    """As a dense least-squares problem: the outputs, and below them one row a weight for the damping."""
    kernel, x = problem()
    new = solve(kernel, x, damping=damping)
    kept = x[:, KEEP]
    pull = np.sqrt(damping * np.mean(np.sum(kept**2, 0)))
    system = np.vstack([kept, pull * np.eye(kept.shape[1])])
    expected = np.linalg.lstsq(system, np.vstack([x @ kernel, pull * kernel[KEEP]]), rcond=None)[0]
    np.testing.assert_allclose(np.asarray(new.kernel)[KEEP], expected, atol=2e-4)
    assert not np.asarray(new.kernel)[~KEEP].any()
    np.testing.assert_array_equal(new.mask, np.broadcast_to(KEEP[:, None], kernel.shape))
    assert float(new.loss) == pytest.approx(0.5 * np.sum((x @ (np.asarray(new.kernel) - kernel)) ** 2), rel=1e-3)


def test_what_costs_nothing():
    """Nothing changes where nothing goes; inputs that others are made of are not missed; nor are dead ones."""
    kernel, x = problem()
    np.testing.assert_array_equal(solve(kernel, x, np.ones(20, bool)).kernel, kernel)
    kernel, x = problem(dependent=True)
    new = np.asarray(solve(kernel, x, damping=1e-7).kernel)
    np.testing.assert_allclose(x @ new, x @ kernel, atol=0.02 * np.abs(x @ kernel).std())
    moved = x[:, KEEP] @ (new - kernel)[KEEP]
    assert np.abs(moved).std() > np.abs(x @ kernel).std() / 2  # there was something to make up for
    x[:, ~KEEP] = 0
    np.testing.assert_array_equal(np.asarray(solve(kernel, x).kernel)[KEEP], kernel[KEEP])


def test_dead_inputs_and_bfloat16():
    """A kept input that was always zero keeps its weights, whatever else; the dtype stays."""
    kernel, x = problem()
    x[:, 0] = 0
    new = solve(jnp.asarray(kernel, jnp.bfloat16), x).kernel
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new[0], jnp.asarray(kernel[0], jnp.bfloat16))
    wide = solve(np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32), x).kernel
    np.testing.assert_array_equal(new, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": np.zeros(20, bool)}, "none of its 20 inputs stays"),
        ({"keep": np.ones(19, bool)}, r"got \(20, 6\), \(20, 20\) and \(19,\)"),
        ({"keep": np.arange(20)}, "a mask"),
        ({"gram": np.full((20, 20), np.nan)}, "NaN or inf"),
        ({"gram": -np.eye(20)}, "negative"),
        ({"kernel": np.ones((20, 6), np.int32)}, "int32"),
    ],
)
def test_refuses(change, message):
    kernel, x = problem()
    given = {"kernel": kernel, "gram": x.T @ x, "keep": KEEP} | change
    with pytest.raises(JpruneError, match=message):
        compensate(jnp.asarray(given["kernel"]), jnp.asarray(given["gram"], jnp.float32), given["keep"])
