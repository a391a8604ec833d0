"""How zeros are shared out: not one more or less, whatever the blocks are like, and by the published formulas."""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jprune import counts
from jprune.allocations import DLP, OWL, Linear, Loss, spread
from jprune.allocations.base import score_of_block
from jprune.anatomy.kernels import Kernel
from jprune.anatomy.sharing import achieved, share_out, sharing
from jprune.errors import JpruneError
from jprune.patterns import NM, Unstructured
from jprune.pipeline.recipe import Recipe
from jprune.pipeline.registry import ALLOCATIONS
from jprune.statistics import SquaredNorm

BANDED = [Linear(), OWL(), DLP()]
NAMES = [type(x).__name__ for x in BANDED]


@st.composite
def models(draw):
    """Kernels of blocks that may differ in everything, some of them stacks, and sparsities of the blocks."""
    pattern, per = draw(
        st.sampled_from([(Unstructured(0.6), "block"), (Unstructured(0.37), "output"), (NM(4, 8), "output")])
    )
    if isinstance(pattern, Unstructured):
        pattern = dataclasses.replace(pattern, sparsity=draw(st.floats(0, 0.99)))
    kernels = []
    for block in range(draw(st.integers(1, 6))):
        for name in range(draw(st.integers(1, 3))):
            shape = (8 * draw(st.integers(1, 9)), draw(st.integers(1, 30)))
            kernels.append(
                Kernel(
                    path=f"blocks/{block}/{name}/kernel",
                    unit=f"blocks/{block}",
                    shape=shape,
                    in_axes=(0,),
                    stage=0,
                    pattern=pattern,
                )
            )
    experts = {"shape": (3, 16, 5), "in_axes": (1,), "batch_axes": (0,), "stage": 0, "pattern": pattern}
    kernels.append(Kernel(path="blocks/0/experts", unit="blocks/0", **experts))
    kernels.append(Kernel(path="blocks/1/experts", unit="blocks/1", **experts))
    kernels.append(Kernel(path="head/kernel", unit="head", shape=(8, 9), in_axes=(0,), stage=0, pattern=pattern))
    shared = sharing(kernels, {"blocks/0/0/kernel"}, per)
    return kernels, shared, per, {block: draw(st.floats(0, 1)) for block in shared}


def zeros(kernel, per):
    """As the solvers make them, counted kernel by kernel of a stack."""
    copies = kernel.stack[0] if kernel.stack else 1
    return copies * kernel.pattern.among(per).zeros(kernel.d_in, kernel.d_out)


@settings(max_examples=50, deadline=None)
@given(models())
def test_a_model_has_as_many_zeros_as_without(model):
    kernels, shared, per, sparsities = model
    new = share_out(kernels, shared, sparsities, per)
    assert [kernel.path for kernel in new] == [kernel.path for kernel in kernels]
    assert sum(zeros(k, per) for k in new) == sum(zeros(k, per) for k in kernels)
    free = {kernel.path for block in shared.values() for kernel in block}
    assert free == {k.path for k in kernels} - {"blocks/0/0/kernel", "head/kernel"}
    for old, kernel in zip(kernels, new, strict=True):
        kernel.pattern.check(kernel.d_in)
        if kernel.path not in free:
            assert kernel == old
        elif isinstance(old.pattern, NM):
            assert kernel.pattern in [NM(n, 8) for n in range(2, 7)]
    for block, share in achieved(shared, new, per).items():
        members = [k for k in new if k.unit == block and k.path in free]
        assert share == sum(zeros(k, per) for k in members) / sum(k.size for k in members)


@given(st.integers(1, 10**9), st.data())
def test_a_share_is_the_count_again(count, data):
    part = data.draw(st.integers(0, count - 1))
    assert counts.floor(count, counts.share(part, count)) == part


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BANDED),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1000)), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
def test_the_mean_of_all_elements_stays(allocation, blocks, sparsity):
    scores, sizes = (np.array(column, np.float64) for column in zip(*blocks))
    shares = allocation.sparsities(scores, sizes, sparsity)
    assert np.isclose((shares * sizes).sum() / sizes.sum(), sparsity, atol=1e-9)
    assert shares.min() >= 0
    assert shares.max() <= max(0.95, sparsity) + 1e-12
    assert np.ptp(shares) <= 2 * allocation.band + 1e-12
    if np.ptp(allocation.importance(scores)) > 0 and 0.31 < sparsity < 0.64:  # nothing to cut off
        assert np.isclose(np.ptp(shares), 2 * allocation.band)
        assert (np.argsort(-shares, kind="stable") == np.argsort(allocation.importance(scores), kind="stable")).all()


def test_what_a_block_may_not_take_the_others_take():
    shares = spread.banded(np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0]), 0.9, 0.2)
    # 1.14, 0.94 and 0.74 by the line; what the first has above 0.95 the others share.
    np.testing.assert_allclose(shares, [0.95, 0.95, 0.85])


@pytest.fixture
def blocks(rng):
    """Kernels and what is known of their inputs, of five blocks alike; in the last, one input towers over all."""
    found = []
    for block in range(5):
        kernels = [rng.standard_t(3, size=shape).astype(np.float32) for shape in ((24, 10), (16, 24))]
        norms = [rng.uniform(0.1, 1 + block, size=len(kernel)).astype(np.float32) for kernel in kernels]
        norms[0][3] *= 1 + 40 * (block == 4)
        found.append((kernels, norms))
    return found


def slowly(name, blocks, sparsity):
    """OWL and DLP as the papers have them: one bag of scores for each block."""
    bags = [np.concatenate([(np.abs(w) * np.sqrt(g)[:, None]).ravel() for w, g in zip(*block)]) for block in blocks]
    if name == "OWL":
        importance, band = np.array([(bag > 5 * bag.mean()).mean() for bag in bags]), 0.08
    else:
        medians = np.array([np.sort(bag)[(len(bag) - 1) // 2] for bag in bags])
        importance, band = 1 - medians / medians.sum(), 0.15
    density = (importance - importance.min()) / (importance.max() - importance.min()) * 2 * band
    density += (1 - sparsity) - density.mean()
    return 1 - density


@pytest.mark.parametrize("allocation", BANDED[1:], ids=NAMES[1:])
def test_the_published_formulas(blocks, allocation):
    scores = []
    for kernels, norms in blocks:
        statistics = [SquaredNorm(jnp.asarray(g)[None], jnp.ones(1, jnp.int32)) for g in norms]
        scores.append(float(score_of_block(allocation, [jnp.asarray(w)[None] for w in kernels], statistics)))
    own = allocation.sparsities(np.array(scores), np.full(5, 624.0), 0.7)
    expected = slowly(type(allocation).__name__, blocks, 0.7)
    np.testing.assert_allclose(own, expected, rtol=1e-5)
    assert np.ptp(expected) > 0.1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 100)), min_size=2, max_size=8),
    st.floats(0.05, 0.9),
    st.data(),
)
def test_no_exchange_of_zeros_lowers_the_damage(blocks, sparsity, data):
    damages, sizes = (np.array(column, np.float64) for column in zip(*blocks))
    damages = np.maximum(damages, max(damages.mean() / 1000, 1e-12))
    loss = Loss(band=0.2)
    shares = loss.sparsities(damages, sizes, sparsity)
    assert np.isclose((shares * sizes).sum() / sizes.sum(), sparsity, atol=1e-9)
    assert np.abs(shares - sparsity).max() <= loss.band + 1e-9
    assert 0 <= shares.min() <= shares.max() <= 0.95 + 1e-9
    one, other = data.draw(st.permutations(range(len(sizes))))[:2]
    moved = shares + np.eye(len(sizes))[one] * 1e-4 / sizes[one] - np.eye(len(sizes))[other] * 1e-4 / sizes[other]
    within = np.abs(moved - sparsity).max() <= loss.band and 0 <= moved.min() <= moved.max() <= 0.95
    total = [np.sum(damages * np.exp(loss.rate * (x - sparsity))) for x in (shares, moved)]
    assert not within or total[1] >= total[0] * (1 - 1e-6)


def test_sparsity_rises_along_a_line():
    np.testing.assert_allclose(Linear(band=0.2).sparsities(np.zeros(5), np.ones(5), 0.5), [0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_an_allocation_is_called_by_its_name(name):
    made = Recipe(pattern=Unstructured(0.5), allocate=name)
    assert made.allocation == ALLOCATIONS[name]()
    assert made.allocation.uniform == (name == "uniform")
    assert made.json()["allocate"] == name
    assert Recipe(pattern=Unstructured(0.5), allocate=made.allocation).json()["allocate"]["allocation"] == name


def test_a_band_goes_with_the_name():
    assert Recipe(pattern=NM(4, 8), allocate="owl=0.2").allocation == OWL(band=0.2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocate": "owll"}, "allocate is one of uniform, linear, owl, dlp, loss"),
        ({"allocate": "owl=much"}, "the band of an allocation is a number"),
        ({"allocate": "dlp=1"}, r"a difference of sparsities in \[0, 1\)"),
        ({"allocate": "uniform=0.1"}, "the uniform allocation has no band"),
        ({"allocate": {"allocation": "owl", "n": 3}}, "has no such options"),
        ({"allocate": "linear", "keep_zeros": True}, "`keep_zeros` goes with the uniform allocation only"),
    ],
)
def test_what_is_no_allocation(options, words):
    with pytest.raises(JpruneError, match=words):
        Recipe(pattern=Unstructured(0.5), **options)
