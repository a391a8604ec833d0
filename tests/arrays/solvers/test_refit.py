"""Refitting against exact least squares in NumPy float64, output by output, and against where it began."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_scores import magnitude, select
from numpy_sparsegpt import damped, reconstruction

import jprune
from jprune import Gram, Magnitude, SparseGPT, Wanda
from jprune.errors import JpruneError
from jprune.patterns import NM
from jprune.solvers import refit

D_IN, D_OUT = 48, 20


@pytest.fixture
def problem(rng):
    """A kernel, the Gram matrix of correlated inputs of different sizes (of which one is dead), and half a mask."""
    x = rng.normal(size=(200, D_IN)) + 2 * rng.normal(size=(200, 6)) @ rng.normal(size=(6, D_IN))
    x *= np.exp(rng.normal(size=D_IN) / 2)
    x[:, 5] = 0
    kernel = rng.normal(size=(D_IN, D_OUT)).astype(np.float32)
    mask = select(magnitude(kernel), sparsity=0.5, per="kernel")
    mask[:, 3] = False  # an output that lost all
    return jnp.asarray(kernel), jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(mask)


def losses(kernel, gram, new):
    """The loss of every output as it is defined; the weights of dead inputs cost nothing."""
    live = np.diagonal(gram)[:, None] > 0
    new, kernel = np.where(live, new, 0), np.where(live, kernel, 0)
    return np.array([reconstruction(new[:, [j]], kernel[:, [j]], damped(gram)) for j in range(new.shape[1])])


def exact(kernel, gram, mask):
    """Least squares with the kept inputs of each output."""
    kernel, mask, matrix = np.asarray(kernel, np.float64), np.asarray(mask), damped(gram)
    live = np.diagonal(gram) > 0
    new = np.zeros(kernel.shape)
    for j in range(kernel.shape[1]):
        kept = mask[:, j] & live
        new[kept, j] = np.linalg.solve(matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, live)] @ kernel[live, j])
    return new


def test_ten_steps_come_within_four_per_cent_of_the_best_weights(problem):
    kernel, gram, mask = problem
    found = refit(kernel, gram, mask)
    new = np.asarray(found.kernel)
    assert not new[~np.asarray(mask)].any()
    np.testing.assert_array_equal(new[5], np.where(mask[5], kernel[5], 0))  # nothing is known of a dead input
    best, begun, reached = (
        losses(kernel, gram, x).sum() for x in (exact(kernel, gram, mask), np.where(mask, kernel, 0), new)
    )
    assert reached - best < 0.04 * (begun - best)
    assert reached < 0.7 * begun, "there was something to gain"
    assert float(found.loss) == pytest.approx(reached, rel=1e-4)
    far = refit(kernel, gram, mask, steps=100)
    np.testing.assert_allclose(losses(kernel, gram, far.kernel).sum(), best, rtol=1e-4)


def test_every_step_helps_every_output(problem):
    kernel, gram, mask = problem
    steps = [losses(kernel, gram, refit(kernel, gram, mask, steps=k).kernel) for k in range(9)]
    assert all((after <= before * (1 + 1e-6)).all() for before, after in itertools.pairwise(steps))
    np.testing.assert_array_equal(refit(kernel, gram, mask, steps=0).kernel, np.where(mask, kernel, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_never_worse_than_where_it_began(problem, dtype):
    """Not even by the rounding of weights that were the best already; and a sum of any size says the same."""
    kernel, gram, mask = problem
    kernel = kernel.astype(dtype)
    start = jnp.asarray(exact(kernel, gram, mask), jnp.float32).astype(dtype)
    begun = losses(kernel.astype(jnp.float32), gram, start.astype(jnp.float32))
    for scale in (1.0, 2.0**60, 2.0**-60):
        found = refit(kernel, gram * scale, mask, start, steps=20)
        assert found.kernel.dtype == dtype
        ended = losses(kernel.astype(jnp.float32), gram, found.kernel.astype(jnp.float32))
        assert (ended <= begun * (1 + 1e-6)).all()
        assert float(found.loss) == pytest.approx(scale * ended.sum(), rel=1e-4)


def test_what_cannot_be_refitted_is_said(problem):
    kernel, gram, mask = problem
    diagonal = jnp.diag(jnp.diagonal(gram))
    for matrix, message in (
        (gram.at[0, 0].set(jnp.nan), "mine: the statistic of its inputs has NaN"),
        (-gram, "is negative in 47 of 48"),
        (diagonal - 40 * (gram - diagonal), "not positive semi-definite"),
    ):
        with pytest.raises(JpruneError, match=message):
            refit(kernel, matrix, mask, where="mine")


@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
def test_methods_refit_what_they_give(problem, make):
    """The mask stays, the loss falls, and the statistic is a Gram, whatever the method needs without it."""
    kernel, gram, _ = problem
    plain, method = make(), make(refit=10)
    assert method.statistic is Gram
    known = Gram(gram, jnp.int32(200))
    given = {None: None, Gram: known}.get(plain.statistic, jprune.SquaredNorm(jnp.diagonal(gram), jnp.int32(200)))
    pattern = NM(2, 4)
    before = plain(kernel, given, pattern)
    after = method.together({"a": kernel}, known, {"a": pattern}, {})["a"]
    np.testing.assert_array_equal(after.mask, before.mask)
    begun, ended = losses(kernel, gram, before.kernel), losses(kernel, gram, after.kernel)
    assert (ended <= begun * (1 + 1e-6)).all()
    assert ended.sum() < 0.95 * begun.sum()
    assert float(after.loss) == pytest.approx(ended.sum(), rel=1e-4)
    assert method.flops(64, 64) > plain.flops(64, 64)
    assert method.nbytes(64, 64) > plain.nbytes(64, 64)


def test_a_method_with_another_statistic_cannot():
    class ByVariance(jprune.ByScore):
        statistic = jprune.Moments

        def score(self, kernel, statistic):
            return jnp.abs(kernel) * statistic.variance[:, None]

    with pytest.raises(JpruneError, match="refit needs a Gram of the inputs, and ByVariance a Moments"):
        ByVariance(refit=1)
    with pytest.raises(JpruneError, match="0 or more; got -1"):
        Wanda(refit=-1)


def test_masks_of_any_origin(problem):
    """In a tree, kernels with masks only; a kernel with head axes is refitted in its matrix view."""
    kernel, gram, mask = problem
    heads = kernel.reshape(D_IN, 4, 5)
    params = {"q": {"kernel": heads}, "k": {"kernel": kernel}, "bias": jnp.ones(3)}
    given = {"q/kernel": mask.reshape(heads.shape)}
    known = {path: Gram(gram, jnp.int32(200)) for path in ("q/kernel", "k/kernel")}
    new = jprune.refit(params, known, given)
    np.testing.assert_allclose(
        new["q"]["kernel"].reshape(D_IN, D_OUT), refit(kernel, gram, mask).kernel, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(new["k"]["kernel"], kernel)
    with pytest.raises(JpruneError, match=r"k/kernel: expected a bool mask \(48, 20\) to keep"):
        jprune.refit(params, known, {"k/kernel": mask.T})
    assert jax.tree.structure(new) == jax.tree.structure(params)
