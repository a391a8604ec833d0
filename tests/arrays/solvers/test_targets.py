"""Targets from the dense model: what is gathered of two models, and what is solved towards, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_sparsegpt import damped

import jprune
from jprune import NM, Admm, Alps, CrossGram, Gram, Magnitude, SparseGPT, Wanda, devices
from jprune.cross_gram import beside
from jprune.errors import JpruneError
from jprune.solvers import dense_targets, refit
from jprune.statistics import Stacked, merge_parts, update_in_parts

D_IN, D_OUT = 24, 12


@pytest.fixture
def inputs(rng):
    """Of the pruned model, one of which is dead, and of the dense one: correlated, and not far from each other."""
    dense = rng.normal(size=(300, D_IN)) + 2 * rng.normal(size=(300, 4)) @ rng.normal(size=(4, D_IN))
    pruned = dense + 0.4 * rng.normal(size=dense.shape) + 0.3 * dense[:, ::-1]
    pruned[:, 5] = 0
    return jnp.asarray(pruned, jnp.float32), jnp.asarray(dense, jnp.float32)


@pytest.fixture
def kernel(rng):
    return jnp.asarray(rng.normal(size=(D_IN, D_OUT)), jnp.float32)


def seen(pruned, dense):
    return CrossGram.zeros(pruned.shape[1]).update(beside(pruned, dense))


@pytest.fixture
def streams(rng, inputs):
    """Residual streams of the pruned model and of the dense one, apart by something that the inputs say and noise."""
    dense = rng.normal(size=(300, D_OUT)) + 3
    error = np.asarray(inputs[0]) @ rng.normal(size=(D_IN, D_OUT)) + rng.normal(size=dense.shape)
    return tuple(jnp.asarray(h, jnp.float32) for h in (dense + error, dense))


def mixed(pruned, dense, kernel, strength):
    """The outputs that are wanted."""
    pruned, dense, kernel = (np.asarray(x, np.float64) for x in (pruned, dense, kernel))
    return ((1 - strength) * pruned + strength * dense) @ kernel


def test_what_is_gathered_of_two_models(inputs):
    """In any grouping, with weights, by the tokens of one part or of several."""
    x, y = (np.asarray(own, np.float64) for own in inputs)
    pairs = beside(*inputs)
    whole = seen(*inputs)
    halves = CrossGram.zeros(D_IN).update(pairs[:110]).merge(CrossGram.zeros(D_IN).update(pairs[110:]))
    parts = jax.tree.map(lambda leaf: leaf[None], CrossGram.zeros(D_IN))
    one = merge_parts(update_in_parts(parts, pairs, devices.one_device()))
    twice = CrossGram.zeros(D_IN).update(pairs[:110], jnp.full(110, 2.0))
    for known, want in (
        (whole, (x, y)),
        (halves, (x, y)),
        (one, (x, y)),
        (twice, (x[:110].repeat(2, 0), y[:110].repeat(2, 0))),
    ):
        np.testing.assert_allclose(known.total, want[0].T @ want[0], rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(known.total + known.apart, want[0].T @ want[1], rtol=1e-4, atol=1e-2)
    assert int(whole.tokens) == int(halves.tokens) == 300
    assert not np.asarray(seen(inputs[0], inputs[0]).apart).any(), "models that agree are not apart, to the last bit"
    with pytest.raises(
        JpruneError, match="expected the 24 inputs of the pruned model and of the dense one side by side, as"
    ):
        CrossGram.zeros(D_IN).update(inputs[0])


def test_what_is_gathered_of_residual_streams(inputs, streams):
    """In any grouping, and with weights."""
    x, error = np.asarray(inputs[0], np.float64), np.asarray(streams[1] - streams[0], np.float64)
    rows = beside(*inputs, streams[1] - streams[0])
    zero = CrossGram.zeros(D_IN, D_OUT)
    whole, halves = zero.update(rows), zero.update(rows[:110]).merge(zero.update(rows[110:]))
    for known in (whole, halves):
        np.testing.assert_allclose(known.residual, x.T @ error, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(known.apart, seen(*inputs).apart, rtol=1e-4, atol=1e-2)
    twice = zero.update(rows[:110], jnp.full(110, 2.0)).residual
    np.testing.assert_allclose(twice, 2 * x[:110].T @ error[:110], rtol=1e-4, atol=1e-2)
    with pytest.raises(JpruneError, match="side by side, and 12 of what the outputs are added to, as"):
        zero.update(beside(*inputs))


def test_experts_that_the_models_do_not_agree_on(rng):
    """A token counts where the pruned model sends it; the dense one's inputs do, where both send it."""
    x, y = (rng.normal(size=(2, 30, 4)).astype(np.float32) for _ in range(2))
    x[0, :10], y[0, 5:20], y[1] = 0, 0, 0
    known = Stacked.zeros(CrossGram, 4, 2).update(beside(jnp.asarray(x), jnp.asarray(y)))
    np.testing.assert_array_equal(known.tokens, [20, 30])
    np.testing.assert_allclose(known.each.total, np.einsum("etd,etf->edf", x, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(known.of(0).apart, x[0, 20:].T @ (y[0, 20:] - x[0, 20:]), rtol=1e-4, atol=1e-4)
    assert not np.asarray(known.of(1).apart).any()
    alike = known.alike()
    np.testing.assert_array_equal(alike.total, np.eye(4))
    assert not np.asarray(alike.apart).any()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_target_is_least_squares(inputs, kernel, strength):
    known = seen(*inputs)
    got = dense_targets(kernel, known.total, known.apart, strength)
    x, w = np.asarray(inputs[0], np.float64), np.asarray(kernel, np.float64)
    matrix = damped(x.T @ x)
    right = x.T @ mixed(*inputs, kernel, strength) + (matrix - x.T @ x) @ w
    np.testing.assert_allclose(got, np.linalg.solve(matrix, right), rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(got[5], kernel[5])  # nothing is known of a dead input
    if strength == 0:
        np.testing.assert_array_equal(got, kernel)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_target_takes_away_what_it_can_of_the_residual_streams_error(inputs, streams, kernel, strength):
    """Least squares of what is wanted after the addition, by rows for the damping below those of the tokens."""
    known = CrossGram.zeros(D_IN, D_OUT).update(beside(*inputs, streams[1] - streams[0]))
    got = dense_targets(kernel, known.total, known.apart, strength, residual=known.residual)
    x, y, w = (np.asarray(a, np.float64) for a in (*inputs, kernel))
    now, before = (np.asarray(h, np.float64) for h in streams)
    wanted = (1 - strength) * (now + x @ w) + strength * (before + y @ w) - now
    damping = np.sqrt(np.diag(damped(x.T @ x) - x.T @ x))
    best = np.linalg.lstsq(np.vstack([x, np.diag(damping)]), np.vstack([wanted, damping[:, None] * w]))[0]
    np.testing.assert_allclose(got, best, rtol=2e-3, atol=2e-4)
    for method in (SparseGPT(dense_targets=strength), Admm(dense_targets=strength)):
        pruned = method(kernel, known, NM(2, 4))
        plain = method(kernel, dataclasses.replace(known, residual=None), NM(2, 4))
        near, far = (np.linalg.norm(x @ np.asarray(own.kernel) - wanted) for own in (pruned, plain))
        assert near < far
    with pytest.raises(JpruneError, match=r"a: expected one kernel of shape \(24, 12\).*got a \(24, 12\), b"):
        SparseGPT(dense_targets=0.5).together({"a": kernel, "b": kernel}, known, {"a": NM(2, 4), "b": NM(2, 4)}, {})


def test_all_of_it_without_pruning_gives_what_the_dense_outputs_leave(inputs, kernel):
    """As good as NumPy's least squares of them, with next to no damping."""
    x, y = (np.asarray(own, np.float64) for own in inputs)
    known = seen(*inputs)
    new = np.asarray(dense_targets(kernel, known.total, known.apart, 1.0, damping=1e-7), np.float64)
    wanted = y @ np.asarray(kernel, np.float64)
    best = np.linalg.lstsq(x, wanted)[0]
    np.testing.assert_allclose(np.linalg.norm(x @ new - wanted), np.linalg.norm(x @ best - wanted), rtol=1e-4)
    np.testing.assert_allclose(x @ new, x @ best, atol=0.01 * np.abs(wanted).max())


METHODS = [SparseGPT(), SparseGPT(refit=5), Admm(iterations=4), Alps(iterations=6), Wanda(refit=5), Magnitude(refit=5)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.refit}")
def test_methods_come_closer_to_the_dense_outputs(inputs, kernel, method):
    aimed = dataclasses.replace(method, dense_targets=0.5)
    assert (method.statistic, aimed.statistic) == (Gram, CrossGram)
    known, same = seen(*inputs), seen(inputs[0], inputs[0])
    gram = Gram(known.total, known.tokens)
    plain, towards, nothing = (
        own.together({"a": kernel}, statistic, {"a": NM(2, 4)}, {})["a"]
        for own, statistic in ((method, gram), (aimed, known), (aimed, same))
    )
    jax.tree.map(np.testing.assert_array_equal, nothing, plain)  # models that agree: to the bit what it is without
    wanted = mixed(*inputs, kernel, 0.5)
    far, near = (np.linalg.norm(np.asarray(inputs[0]) @ np.asarray(own.kernel) - wanted) for own in (plain, towards))
    assert near < 0.97 * far
    assert (np.asarray(towards.mask).reshape(-1, 4, D_OUT).sum(1) == 2).all()
    assert not np.asarray(towards.kernel)[~np.asarray(towards.mask)].any()
    assert aimed.flops(64, 64) > method.flops(64, 64)
    assert aimed.nbytes(64, 64) > method.nbytes(64, 64)


def test_it_is_solving_for_the_target(inputs, kernel):
    """In the dtype of the kernel, with zeros that are kept, and in a tree."""
    known = seen(*inputs)
    method = SparseGPT(dense_targets=0.5)
    target = dense_targets(kernel, known.total, known.apart, 0.5)
    want = jprune.solvers.sparsegpt(target, known.total, NM(2, 4))
    params, masks = jprune.prune({"kernel": kernel}, {"kernel": known}, method, NM(2, 4))
    np.testing.assert_allclose(params["kernel"], want.kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(masks["kernel"], want.mask)
    half = method(kernel.astype(jnp.bfloat16), known, NM(2, 4), keep=jnp.ones(kernel.shape, bool).at[:3].set(False))
    assert half.kernel.dtype == jnp.bfloat16
    assert not half.mask[:3].any()
    best = refit(target, known.total, want.mask, want.kernel, steps=50)
    refitted = SparseGPT(dense_targets=0.5, refit=50)(kernel, known, NM(2, 4))
    np.testing.assert_allclose(refitted.kernel, best.kernel, rtol=1e-4, atol=1e-5)


def test_what_has_no_targets_says_so(inputs, kernel):
    with pytest.raises(JpruneError, match="kernel: expected weights in floating point, got int32"):
        SparseGPT(dense_targets=0.5)(kernel.astype(jnp.int32), seen(*inputs), NM(2, 4))
    with pytest.raises(JpruneError, match=r"dense_targets must be between 0, .* and 1, .*; got 1\.5"):
        SparseGPT(dense_targets=1.5)
    with pytest.raises(JpruneError, match="Wanda without refit solves for none; give refit=10 too"):
        Wanda(dense_targets=0.5)
    with pytest.raises(JpruneError, match="prune_function computes one of them; use dense_targets=0"):
        jprune.prune_function(lambda p, x: x @ p["w"], {}, [], SparseGPT(dense_targets=0.5), NM(2, 4))
