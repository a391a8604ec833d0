"""The sweep kernel, in the interpreter and as its reference, against SparseGPT's own formula in float64."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

solver = importlib.import_module("jprune.solvers._sweep")


def problem(rng, block: int, d_out: int, kept: float):
    x = rng.standard_normal((block, 3 * block))
    gram = x @ x.T + np.eye(block)
    inverse = np.linalg.cholesky(np.linalg.inv(gram)).T  # upper triangular U, U^T U = H^-1
    weights = rng.standard_normal((block, d_out))
    keep = rng.random((block, d_out)) < kept
    return weights.astype(np.float32), inverse.astype(np.float32), keep


def naive(weights, inverse, keep, nm):
    """The paper's loop, one output and one input at a time."""
    weights, keep = weights.astype(np.float64), keep.copy()
    losses = np.zeros(weights.shape[1])
    for o in range(weights.shape[1]):
        w = weights[:, o]
        for i in range(len(w)):
            if nm is not None and i % nm[1] == 0:
                n, m = nm
                scores = [abs(w[j]) / inverse[j, j] if keep[j, o] else -np.inf for j in range(i, i + m)]
                best = sorted(range(m), key=lambda j: (scores[j], j))[m - n :]
                for j in range(m):
                    keep[i + j, o] &= j in best
            if not keep[i, o]:
                error = w[i] / inverse[i, i]
                w[i:] -= error * inverse[i, i:]
                w[i] = 0
                losses[o] += error**2 / 2
    return weights, keep, losses


@pytest.mark.parametrize("nm", [None, (2, 4), (1, 2), (3, 8)])
@pytest.mark.parametrize(("block", "d_out"), [(24, 37), (64, 32)])
def test_against_the_paper(rng, block, d_out, nm):
    weights, inverse, keep = problem(rng, block, d_out, 0.5 if nm is None else 0.9)
    weights[8:12, 0] = 0  # ties
    expected = naive(weights, inverse, keep, nm)
    for interpret in (False, True):
        found = pk.sparsegpt_sweep(
            jnp.asarray(weights), jnp.asarray(inverse), jnp.asarray(keep), nm=nm, interpret=interpret
        )
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-4)
        assert np.all(np.asarray(found[0])[~expected[1]] == 0)


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_against_the_solver(rng, nm):
    """A block of jprune's solver, with its tie rule and its -inf for what may not be kept."""
    weights, inverse, keep = (jnp.asarray(a) for a in problem(rng, 128, 33, 0.5 if nm is None else 0.9))
    kind = solver.Kind(33, nm=nm, given=nm is None)
    real = jnp.ones(128, bool)
    expected = solver.eliminate(weights, inverse, keep, jnp.zeros(1, jnp.int32), real, (kind,), 1)
    for interpret in (False, True):
        found = pk.sparsegpt_sweep(weights, inverse, keep, nm=nm, interpret=interpret)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-4)


def test_under_jit_and_on_cpu(rng):
    arrays = [jnp.asarray(a) for a in problem(rng, 16, 5, 0.5)]
    eager, jitted = pk.sparsegpt_sweep(*arrays), jax.jit(pk.sparsegpt_sweep)(*arrays)
    np.testing.assert_allclose(eager[0], jitted[0], atol=1e-6)


def test_bad_arguments(rng):
    weights, inverse, keep = (jnp.asarray(a) for a in problem(rng, 12, 5, 0.5))
    with pytest.raises(pk.FormatError, match=r"inverse \[12, 12\].*got \[11, 11\]"):
        pk.sparsegpt_sweep(weights, inverse[:11, :11], keep)
    with pytest.raises(pk.FormatError, match="2:8 on a block of 12 inputs"):
        pk.sparsegpt_sweep(weights, inverse, keep, nm=(2, 8))
    with pytest.raises(pk.FormatError, match="2:3"):
        pk.sparsegpt_sweep(weights, inverse, keep, nm=(2, 3))
