"""Where kernels lie, and pruning them there: each as if it were a matrix of its own.

The truth is NumPy's indexing, and `prune` of the same matrices one by one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import trees
from jprune.errors import JpruneError
from jprune.methods import Magnitude, SparseGPT, Wanda
from jprune.patterns import NM, Unstructured
from jprune.places import Observed, Place, check_apart, given
from jprune.statistics import Gram, SquaredNorm, Stacked

D, N = 8, 6  # inputs and outputs of every kernel, so that solvers compile once


def matrices(place, leaf):
    """The matrix views, element by element."""
    part = leaf[tuple(slice(a, b) for a, b in place.part)] if place.part else leaf
    part = part.reshape(place.shape or part.shape)
    rest = [i for i in range(part.ndim) if i not in place.in_axes and i not in place.batch_axes]
    kinds = [[part.shape[i] for i in axes] for axes in (place.batch_axes, place.in_axes, rest)]
    result = np.zeros([int(np.prod(k)) for k in kinds], leaf.dtype)
    for index in np.ndindex(*part.shape):
        own = (tuple(index[i] for i in axes) for axes in (place.batch_axes, place.in_axes, rest))
        where = [int(np.ravel_multi_index(i, k)) if k else 0 for i, k in zip(own, kinds, strict=True)]
        result[tuple(where)] = part[index]
    return result


PLACES = {
    "whole": ((D, N), Place(path="w", in_axes=(0,))),
    "outputs first": ((N, D), Place(path="w", in_axes=(1,))),
    "heads": ((4, 2, N), Place(path="w", in_axes=(0, 1))),
    "inputs around outputs": ((2, N, 4), Place(path="w", in_axes=(0, 2))),
    "experts": ((3, D, N), Place(path="w", in_axes=(1,), batch_axes=(0,))),
    "experts in between": ((D, 3, N), Place(path="w", in_axes=(0,), batch_axes=(1,))),
    "layers of experts": ((2, 3, N, D), Place(path="w", in_axes=(3,), batch_axes=(0, 1))),
    "a third": ((D, 3 * N), Place(path="w", in_axes=(0,), part=((0, D), (N, 2 * N)))),
    "one of two": ((2, D, N), Place(path="w", in_axes=(0, 1), part=((1, 2), (0, D), (0, N)))),
    "heads in one axis": ((3 * D, N), Place(path="w", in_axes=(1,), batch_axes=(0,), shape=(3, D, N))),
    "a reshaped part": ((D, 2 * N), Place(path="w", in_axes=(0, 1), part=((0, D), (3, 9)), shape=(2, 4, N))),
}


@pytest.mark.parametrize("name", PLACES)
def test_matrix_views_and_back(rng, name):
    shape, place = PLACES[name]
    leaf = rng.normal(size=shape).astype(np.float32)
    views = matrices(place, leaf)
    assert views.shape == place.counts(shape)
    assert views.shape[1:] == (D, N)
    for given_leaf in (leaf, jnp.asarray(leaf)):
        np.testing.assert_array_equal(place.matrices(given_leaf), views)
    changed = np.asarray(place.put(jnp.asarray(leaf), jnp.asarray(views) + 1))
    np.testing.assert_array_equal(matrices(place, changed), views + 1)
    assert (changed != leaf).sum() == views.size, "nothing else changes"
    mask = place.put(jnp.ones(shape, bool), jnp.asarray(views > 0))
    assert mask.dtype == bool
    np.testing.assert_array_equal(matrices(place, np.asarray(mask)), views > 0)


def test_places_that_do_not_fit():
    for fields in ({"in_axes": (1, 0)}, {"in_axes": (0,), "batch_axes": (0,)}, {"in_axes": (-1,)}):
        with pytest.raises(JpruneError, match="w: expected ascending numbers of axes"):
            Place(path="w", **fields)
    wrong = [
        ((D,), PLACES["a third"][1]),
        ((D, N), PLACES["a third"][1]),
        ((D,), PLACES["experts"][1]),
        ((D, N), PLACES["heads in one axis"][1]),
    ]
    for shape, place in wrong:
        for use in (place.matrices, lambda leaf, place=place: place.put(leaf, jnp.zeros((1, D, N)))):
            with pytest.raises(JpruneError, match=r"expected a leaf that Place.*path='w'.* fits, got one of shape"):
                use(jnp.zeros(shape))


def test_overlapping():
    a, b, c = (Place(path="w", in_axes=(0,), part=((0, 4), p)) for p in ((0, 3), (2, 5), (3, 6)))
    whole, other = Place(path="w", in_axes=(0,)), Place(path="v", in_axes=(0,))
    assert a.overlaps(b)
    assert b.overlaps(c)
    assert not a.overlaps(c)
    assert whole.overlaps(a)
    assert a.overlaps(whole)
    assert not whole.overlaps(other)
    check_apart([a, c, other])
    with pytest.raises(JpruneError, match=r"no element in common, found .*0, 3.* and .*2, 5"):
        check_apart([a, c, b])


def test_matmuls_say_where_kernels_lie():
    def f(params, x):
        h = jnp.einsum("bti,eij->bte", x, params["experts"]) @ params["tied"]
        return (h @ params["tied"], x @ params["once"].T)

    params = {"experts": jnp.ones((3, 8, 2)), "tied": jnp.ones((3, 3)), "once": jnp.ones((5, 8))}
    found = given(jprune.matmuls(f, params, jnp.ones((2, 4, 8))))
    assert found["tied"] == (Place(path="tied", in_axes=(0,)),), "once, though it is used twice"
    assert found["once"] == (Place(path="once", in_axes=(1,)),)
    assert given({"w": [0, 1]}) == {"w": (Place(path="w", in_axes=(0, 1)),)}


def observed(kind, leaves):
    """Statistics of inputs by path: `leaves` are lists of (place, inputs [stack, tokens, d_in])."""
    statistics, places = {}, {}
    for place, x in leaves:
        statistic = Stacked.zeros(kind, D, len(x)).update(x) if place.batch_axes else kind.zeros(D).update(x[0])
        statistics[place.key], places[place.key] = statistic, place
    return Observed(statistics, places)


def inputs(rng, place, shape, tokens=40):
    """Correlated inputs for each kernel, each of a size of its own."""
    stack = place.counts(shape)[0]
    mixed = rng.normal(size=(stack, tokens, D)) @ rng.normal(size=(stack, D, D)) * np.geomspace(0.1, 10, D)
    return jnp.asarray(mixed, jnp.float32)


def one_by_one(method, pattern, views, x):
    """The pruned matrices and masks of a stack, each pruned as a parameter of its own."""
    results = []
    for kernel, tokens in zip(views, x, strict=True):
        params = {"kernel": jnp.asarray(kernel)}
        statistic = {"kernel": method.statistic.zeros(D).update(tokens)}
        results.append(jprune.prune(params, statistic, method, pattern, in_axes={"kernel": (0,)}))
    return tuple(np.stack([np.asarray(r[i]["kernel"]) for r in results]) for i in (0, 1))


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_kernels_are_pruned_where_they_lie(rng, method, name):
    shape, place = PLACES[name]
    leaf, x = rng.normal(size=shape).astype(np.float32), inputs(rng, place, shape)
    params = {"w": jnp.asarray(leaf), "bias": jnp.ones(3)}
    pattern = NM(2, 4)
    new, masks = jprune.prune(params, observed(method.statistic, [(place, x)]), method, pattern)
    kernels, kept = one_by_one(method, pattern, matrices(place, leaf), x)
    np.testing.assert_array_equal(matrices(place, np.asarray(masks["w"])), kept)
    np.testing.assert_allclose(matrices(place, np.asarray(new["w"])), kernels, rtol=1e-5, atol=1e-6)
    elsewhere = np.asarray(place.put(jnp.ones(shape, bool), jnp.zeros_like(kept)))
    assert np.asarray(masks["w"])[elsewhere].all()
    assert masks["w"].dtype == bool
    np.testing.assert_array_equal(np.asarray(new["w"])[elsewhere], leaf[elsewhere])
    assert (~kept).sum() == len(kept) * D // 2 * N
    assert new["bias"] is params["bias"]
    assert list(masks) == ["w"]


def test_magnitude_keeps_the_count_of_each_kernel(rng):
    """Experts of very different size: none loses more than its share, with statistics that are not needed."""
    shape, place = PLACES["experts"]
    leaf = jnp.asarray(rng.normal(size=shape) * np.array([0.01, 1, 100])[:, None, None], jnp.float32)
    seen = observed(Gram, [(place, inputs(rng, place, shape))])
    _, masks = jprune.prune({"w": leaf}, seen, Magnitude(), Unstructured(0.29))
    assert (~np.asarray(masks["w"])).sum((1, 2)).tolist() == [int(0.29 * D * N)] * 3


def test_two_parts_of_a_leaf_each_by_what_it_sees(rng):
    """And pruned further: the old masks, also of what is of no kernel here, stay."""
    leaf = rng.normal(size=(3, D, N)).astype(np.float32)
    own = [Place(path="w", in_axes=(0, 1), part=((i, i + 1), (0, D), (0, N))) for i in (0, 2)]
    x = [inputs(rng, place, leaf.shape) for place in own]
    seen = observed(SquaredNorm, list(zip(own, x, strict=True)))
    new, masks = jprune.prune({"w": jnp.asarray(leaf)}, seen, Wanda(), Unstructured(0.5))
    for place, tokens in zip(own, x, strict=True):
        _, kept = one_by_one(Wanda(), Unstructured(0.5), matrices(place, leaf), tokens)
        np.testing.assert_array_equal(matrices(place, np.asarray(masks["w"])), kept)
    keep = masks["w"].at[1, 0].set(False)
    new, further = jprune.prune(new, seen, Wanda(), Unstructured(0.75), keep={"w": keep})
    further = np.asarray(further["w"])
    assert not (further & ~np.asarray(keep)).any()
    assert (~further).sum((1, 2)).tolist() == [36, N, 36]
    assert (np.asarray(new["w"])[1, 0] == 0).all()
    assert (np.asarray(new["w"])[1, 1:] == leaf[1, 1:]).all()
    with pytest.raises(JpruneError, match=r"w: expected a bool mask \(3, 8, 6\) to keep, got bool \(8, 6\)"):
        jprune.prune(new, seen, Wanda(), Unstructured(0.75), keep={"w": keep[0]})
    twice = observed(SquaredNorm, [(own[0], x[0]), (Place(path="w", in_axes=(1,)), x[0])])
    with pytest.raises(JpruneError, match="no element in common"):
        jprune.prune(new, twice, Wanda(), Unstructured(0.5))


def test_an_expert_that_saw_nothing_is_pruned_by_its_weights(rng):
    shape, place = PLACES["experts"]
    leaf, x = jnp.asarray(rng.normal(size=shape), jnp.float32), inputs(rng, place, shape).at[1].set(0)
    new, masks = jprune.prune({"w": leaf}, observed(Gram, [(place, x)]), SparseGPT(), NM(2, 4))
    smallest = np.argsort(np.argsort(np.abs(leaf[1]).reshape(2, 4, N), axis=1), axis=1) < 2
    np.testing.assert_array_equal(~np.asarray(masks["w"][1]), smallest.reshape(D, N))
    np.testing.assert_allclose(new["w"][1], np.where(masks["w"][1], leaf[1], 0), rtol=1e-6)
    broken = observed(Gram, [(place, x.at[2, 3, 4].set(jnp.nan))])
    with pytest.raises(
        JpruneError, match="w, kernel 2 of 3: the statistic of its inputs has NaN or inf in 1 of 8 inputs"
    ):
        jprune.prune({"w": leaf}, broken, SparseGPT(), NM(2, 4))


def test_square_kernels_with_outputs_first(rng):
    """PyTorch's layout: no size tells, and what `observe` returns does."""
    x = jnp.asarray(rng.normal(size=(40, D)) @ rng.normal(size=(D, D)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(D, D)), jnp.float32)

    def f(params, x):
        return x @ params["weight"].T

    for method in (Wanda(), SparseGPT()):
        _, seen = jax.jit(jprune.observe(f, method.statistic))({"weight": weight}, x)
        new, masks = jprune.prune({"weight": weight}, seen, method, NM(2, 4))
        transposed, kept = one_by_one(method, NM(2, 4), weight.T[None], x[None])
        np.testing.assert_array_equal(np.asarray(masks["weight"]).T, kept[0])
        np.testing.assert_allclose(new["weight"].T, transposed[0], rtol=1e-5, atol=1e-6)
    _, masks = jprune.prune(
        {"weight": weight},
        None,
        Magnitude(),
        NM(2, 4),
        where="weight",
        in_axes=jprune.matmuls(f, {"weight": weight}, x),
    )
    assert (np.asarray(masks["weight"]).reshape(D, 2, 4).sum(-1) == 2).all()


def test_where_chooses_among_what_was_observed(rng):
    params = {f"{n}/w": jnp.asarray(rng.normal(size=(D, N)), jnp.float32) for n in "abc"} | {"a/scale": jnp.ones(3)}
    own = [Place(path=f"{n}/w", in_axes=(0,)) for n in "ab"]
    seen = observed(SquaredNorm, [(place, inputs(rng, place, (D, N))) for place in own])

    def pruned(**filters):
        return list(jprune.prune(params, seen, Wanda(), Unstructured(0.5), **filters)[1])

    assert pruned() == ["a/w", "b/w"]
    assert pruned(where="a") == ["a/w"], "a leaf that can be no kernel is none"
    assert pruned(skip="b/") == ["a/w"]
    assert pruned(where="w$", skip="c") == ["a/w", "b/w"]
    with pytest.raises(JpruneError, match="c/w is chosen by `where`, and no input of it was observed"):
        pruned(where="w$")
    with pytest.raises(JpruneError, match="leave some of the 2 observed leaves"):
        pruned(where="a/scale")
    with pytest.raises(JpruneError, match=r"'v' matches none of the 4 leaves; near misses: ./w, ./w, ./w"):
        pruned(where="v")
    with pytest.raises(JpruneError, match="a/w: expected `in_axes` to be as observed"):
        pruned(in_axes={"a/w": (1,)})
    with pytest.raises(JpruneError, match="there is a statistic for 'b/w' but no such parameter"):
        jprune.prune({"a/w": params["a/w"]}, seen, Wanda(), Unstructured(0.5))
    stack = {"a/w": Stacked.zeros(SquaredNorm, D, 2)}
    with pytest.raises(JpruneError, match="which axes number the kernels of the stack"):
        jprune.prune(params, stack, Wanda(), Unstructured(0.5), where="a/w")


def test_observed_is_a_pytree_that_merges(rng):
    places = [PLACES["whole"][1], dataclasses.replace(PLACES["experts"][1], path="e")]
    x = [inputs(rng, place, shape) for place, shape in zip(places, ((D, N), (3, D, N)), strict=True)]

    @jax.jit
    def gathered(x):
        return observed(Gram, list(zip(places, x, strict=True)))

    first, second = gathered([part[:, :15] for part in x]), gathered([part[:, 15:] for part in x])
    assert list(first) == ["w", "e"]
    assert first.places["e"] == places[1]
    assert len(first) == 2
    assert list(trees.flatten(first)) == ["w/total", "w/tokens", "e/each/total", "e/each/tokens"]
    for merged in (first.merge(second), jax.tree.map(jnp.add, first, second)):
        assert isinstance(merged, Observed)
        assert merged.places == first.places
        np.testing.assert_allclose(merged["w"].total, gathered(x)["w"].total, rtol=1e-5)
        assert merged["e"].tokens.tolist() == [40, 40, 40]
    with pytest.raises(JpruneError, match="same kernels, found e in one only"):
        first.merge(Observed({"w": second["w"]}, second.places))
    with pytest.raises(JpruneError, match=r"expected what jprune.observe returns, got dict"):
        first.merge(dict(second))
