"""ALPS and ADMM against every mask there is, on kernels small enough, and against SparseGPT.

The contract of all methods compares them with their references.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_sparsegpt import damped

from jprune import NM, Admm, Alps, Gram, SparseGPT, Unstructured
from jprune.errors import JpruneError

D_IN, D_OUT = 24, 12


@pytest.fixture
def seen(rng):
    """A kernel of 24 inputs, and what is known of them: eight that depend on each other, three times over."""
    x = np.concatenate([rng.normal(size=(60, 4)) @ rng.normal(size=(4, 8)) for _ in range(3)], axis=1)
    x += rng.normal(size=x.shape)
    kernel = jnp.asarray(rng.normal(size=(D_IN, D_OUT)), jnp.float32)
    return kernel, Gram.zeros(D_IN).update(jnp.asarray(x, jnp.float32))


def smallest_loss(column, matrix, supports):
    """Of the best weights under each support."""
    found = []
    for support in supports:
        kept = np.array(support)
        best = np.linalg.solve(matrix[np.ix_(kept, kept)], matrix[kept] @ column)
        change = column.copy()
        change[kept] -= best
        found.append(0.5 * change @ matrix @ change)
    return min(found)


@pytest.mark.parametrize("method", [Admm(), Alps()], ids=lambda m: type(m).__name__)
def test_close_to_the_best_of_all_masks(seen, method):
    """In the first eight inputs, the others being dead, four are kept of each output: 70 masks."""
    kernel, known = seen
    live = jnp.arange(D_IN) < 8
    known = Gram(jnp.where(live[:, None] & live, known.total, 0), known.tokens)
    # 8 of 24 are 4 of those 8: dead inputs, which cost nothing, go first.
    pruned = method(kernel, known, Unstructured(20 / 24, "output"))
    assert (np.asarray(pruned.mask)[8:] == 0).all()
    matrix = damped(np.asarray(known.total))[:8, :8]
    best = sum(
        smallest_loss(np.asarray(kernel, np.float64)[:8, j], matrix, itertools.combinations(range(8), 4))
        for j in range(D_OUT)
    )
    sparsegpt = SparseGPT()(kernel, known, Unstructured(20 / 24, "output"))
    assert best * (1 - 1e-4) < float(pruned.loss) < 1.15 * best
    assert float(pruned.loss) < float(sparsegpt.loss)


@pytest.mark.parametrize("method", [Admm(), Alps()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), NM(4, 8)], ids=str)
def test_better_than_sparsegpt_refitted(seen, method, pattern):
    kernel, known = seen
    ours, theirs = method(kernel, known, pattern), SparseGPT(refit=10)(kernel, known, pattern)
    assert (~np.asarray(ours.mask)).sum() == pattern.zeros(D_IN, D_OUT)
    assert float(ours.loss) < float(theirs.loss)


def test_what_cannot_be_pruned_so_is_said(seen):
    kernel, known = seen
    with pytest.raises(JpruneError, match="iterations must be at least 1, got 0"):
        Alps(iterations=0)
    with pytest.raises(JpruneError, match='per="block" is for SparseGPT'):
        Admm()(kernel, known, Unstructured(0.5, "block"))
    wrong = Gram(2 * jnp.diag(jnp.diagonal(known.total)) - 30 * known.total, known.tokens)
    with pytest.raises(JpruneError, match="negative"):
        Alps()(kernel, wrong, NM(2, 4))
