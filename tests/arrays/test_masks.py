"""Masks against a stable argsort, and their properties: exact counts, ties, N:M groups, frozen zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_scores
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import masks
from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured

settings.register_profile("masks", deadline=None, max_examples=30)
settings.load_profile("masks")

smallest = jax.jit(masks.smallest)
SHAPES = [(1, 1), (5, 3), (24, 7), (37, 2)]
# Few values, so that most scores are tied; both zeros, both infinities, neighbouring floats.
VALUES = [-np.inf, -1.5, -0.0, 0.0, 1e-30, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 3e38, np.inf]


def arrays(shape, values):
    """Float32 arrays of a shape with elements drawn from a strategy."""
    n = int(np.prod(shape))
    return st.lists(values, min_size=n, max_size=n).map(lambda x: np.array(x, np.float32).reshape(shape))


@st.composite
def tied_scores(draw, shapes=SHAPES, values=VALUES):
    return draw(arrays(draw(st.sampled_from(shapes)), st.sampled_from(values)))


@given(tied_scores(), st.floats(0, 0.999), st.sampled_from(["output", "kernel"]))
def test_select_is_a_stable_sort(scores, sparsity, per):
    pattern = Unstructured(sparsity, per)
    mask = np.asarray(masks.select(jnp.asarray(scores), pattern))
    np.testing.assert_array_equal(mask, numpy_scores.select(scores, sparsity=sparsity, per=per))
    assert (~mask).sum() == pattern.zeros(*scores.shape)
    if per == "output":
        assert ((~mask).sum(0) == int(len(scores) * sparsity)).all()


@given(arrays((24, 7), st.floats(width=32, allow_nan=False, allow_subnormal=False)), st.integers(0, 24))
def test_smallest_of_any_floats(scores, count):
    expected = np.stack([~numpy_scores.drop(column, count) for column in scores.T], 1)
    np.testing.assert_array_equal(smallest(jnp.asarray(scores), count), expected)


@given(tied_scores(shapes=[(24, 7), (48, 1)]), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 3), (11, 12)]))
def test_nm(scores, nm):
    n, m = nm
    mask = np.asarray(masks.select(jnp.asarray(scores), NM(n, m)))
    np.testing.assert_array_equal(mask, numpy_scores.select(scores, nm=nm))
    assert (mask.reshape(-1, m, mask.shape[1]).sum(1) == n).all()


@given(
    tied_scores(shapes=[(24, 7)], values=VALUES[2:-1]),
    arrays((24, 7), st.booleans()),
    st.sampled_from([Unstructured(0.5, "output"), Unstructured(0.3, "kernel"), NM(2, 4), NM(1, 3)]),
)
def test_what_was_pruned_stays_pruned(scores, keep, pattern):
    keep = keep.astype(bool)
    mask = np.asarray(masks.select(jnp.asarray(scores), pattern, keep=jnp.asarray(keep)))
    if isinstance(pattern, NM):
        expected = numpy_scores.select(scores, nm=(pattern.n, pattern.m), keep=keep)
    else:
        expected = numpy_scores.select(scores, sparsity=pattern.sparsity, per=pattern.per, keep=keep)
    np.testing.assert_array_equal(mask, expected)
    assert not (mask & ~keep).any()
    # Old zeros count towards the sparsity, and only what they exceed it by is added.
    assert (~mask).sum() >= max(pattern.zeros(24, 7), (~keep).sum())
    if (~keep).sum() == 0:
        assert (~mask).sum() == pattern.zeros(24, 7)


@given(
    tied_scores(shapes=[(24, 7)]), st.sampled_from([Unstructured(0.4, "output"), Unstructured(0.4, "kernel"), NM(2, 4)])
)
def test_idempotent(scores, pattern):
    """Pruning again to the same pattern, or the pruned scores by themselves, changes nothing."""
    mask = masks.select(jnp.abs(jnp.asarray(scores)) + 1, pattern)
    again = jnp.where(mask, jnp.abs(jnp.asarray(scores)) + 1, 0)
    np.testing.assert_array_equal(masks.select(again, pattern), mask)
    np.testing.assert_array_equal(masks.select(again, pattern, keep=mask), mask)


@given(st.randoms(use_true_random=False))
def test_permuting_permutes(random):
    """Without ties, the order of inputs and outputs does not matter; for N:M, the order of outputs and groups."""
    seed = np.random.default_rng(random.randrange(2**32))
    scores, rows, columns = seed.permutation(24 * 7).reshape(24, 7), seed.permutation(24), seed.permutation(7)
    scores = jnp.asarray(scores, jnp.float32)
    for pattern in (Unstructured(0.5, "output"), Unstructured(0.5, "kernel")):
        mask = masks.select(scores, pattern)
        np.testing.assert_array_equal(masks.select(scores[rows][:, columns], pattern), mask[rows][:, columns])
    groups = (seed.permutation(6)[:, None] * 4 + np.arange(4)).reshape(-1)
    mask = masks.select(scores, NM(2, 4))
    np.testing.assert_array_equal(masks.select(scores[groups][:, columns], NM(2, 4)), mask[groups][:, columns])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "output"), Unstructured(0.5, "kernel"), NM(2, 4)])
def test_half_precision_scores(rng, dtype, pattern):
    """Half precision is full of ties; they are settled as anywhere else."""
    scores = jnp.asarray(rng.normal(size=(200, 30)), dtype)
    nm, sparsity = ((2, 4), None) if isinstance(pattern, NM) else (None, 0.5)
    expected = numpy_scores.select(scores, sparsity=sparsity, per=getattr(pattern, "per", None), nm=nm)
    np.testing.assert_array_equal(masks.select(scores, pattern), expected)


@pytest.mark.parametrize("columns", [128, 203])
def test_columns_in_chunks(rng, columns, monkeypatch):
    """Wide kernels are searched 64 columns at a time on one CPU; 5001 rows make chunks that small."""
    monkeypatch.setattr(masks, "_in_chunks", lambda: True)
    scores = rng.integers(0, 50, size=(5001, columns)).astype(np.float32)
    expected = numpy_scores.select(scores, sparsity=0.37)
    np.testing.assert_array_equal(masks.select(jnp.asarray(scores), Unstructured(0.37)), expected)


@pytest.mark.parametrize("count", [0, 1, 36, 37])
def test_smallest_of_all_equal(count):
    marked = np.asarray(smallest(jnp.full((37, 2), 2.5), count))
    assert marked[:count].all()
    assert not marked[count:].any()


def test_open_scope_is_per_output(rng):
    scores = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)
    open_scope, per_output = masks.select(scores, Unstructured(0.5)), masks.select(scores, Unstructured(0.5, "output"))
    np.testing.assert_array_equal(open_scope, per_output)
    assert (~np.asarray(open_scope)).sum() == 4 * 5


def test_under_jit_and_vmap(rng):
    scores = rng.integers(0, 9, size=(3, 12, 5)).astype(np.float32)
    for pattern in (Unstructured(0.5, "output"), Unstructured(0.5, "kernel"), NM(2, 4)):
        together = jax.jit(jax.vmap(lambda s, p=pattern: masks.select(s, p)))(jnp.asarray(scores))
        for mask, one in zip(together, scores):
            np.testing.assert_array_equal(mask, masks.select(jnp.asarray(one), pattern))


def test_errors():
    with pytest.raises(JpruneError, match="2:4 needs a number of inputs divisible by 4, it has 6"):
        masks.select(jnp.ones((6, 2)), NM(2, 4))
    with pytest.raises(JpruneError, match='use "output" or "kernel"'):
        masks.select(jnp.ones((6, 2)), Unstructured(0.5, "block"))


@pytest.mark.parametrize("per", ["output", "kernel"])
def test_a_traced_count_prunes_as_a_pattern_does(rng, per):
    """One compiled function for every count; ties and masks of an earlier pruning included."""
    scores, keep = rng.integers(0, 9, size=(40, 6)).astype(np.float32), rng.random((40, 6)) < 0.8
    size = 40 if per == "output" else 240
    pruned = jax.jit(lambda count: masks.without_lowest(jnp.asarray(scores), count, per=per, keep=jnp.asarray(keep)))
    for share in (0.0, 0.25, 0.5, 0.9):
        expected = numpy_scores.select(np.where(keep, scores, -np.inf), sparsity=share, per=per) & keep
        np.testing.assert_array_equal(pruned(jnp.int32(size * share)), expected)
