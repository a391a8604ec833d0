"""Cutting out kept positions: every container and kind of leaf, several groups on one axis, and every refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune.errors import JpruneError
from jprune.places import Observed, Place
from jprune.statistics import Gram, SquaredNorm, Stacked
from jprune.structured import shrink, size
from jprune.trace import Group, Groups, Member


def params(make=np.asarray):
    return {
        "q": {"kernel": make(np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)), "bias": make(np.arange(3.0))},
        "o": [make(np.arange(6.0).reshape(3, 2))],
    }


@pytest.mark.parametrize("make", [np.asarray, lambda x: jnp.asarray(x, jnp.float32)], ids=["np", "jax"])
def test_shrink(make):
    before = params(make)
    after = shrink(before, {"q/kernel": {1: [0, 2], 2: [3]}, "o/0": {0: np.array([0, 2])}})
    np.testing.assert_array_equal(after["q"]["kernel"], np.asarray(before["q"]["kernel"])[:, [0, 2]][:, :, [3]])
    np.testing.assert_array_equal(after["o"][0], np.asarray(before["o"][0])[[0, 2]])
    assert after["q"]["bias"] is before["q"]["bias"]
    assert type(after["q"]["kernel"]) is type(before["q"]["kernel"])
    assert before["q"]["kernel"].shape == (2, 3, 4)


def test_abstract_and_traced():
    keep = {"q/kernel": {0: [1], 2: [0, 1]}}
    shapes = jax.eval_shape(lambda: params(lambda x: jnp.asarray(x, jnp.bfloat16)))
    after = shrink(shapes, keep)
    assert after["q"]["kernel"] == jax.ShapeDtypeStruct((1, 3, 2), jnp.bfloat16)
    assert jax.eval_shape(lambda p: shrink(p, keep), shapes) == after


def test_nnx_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(3, 5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model)
    small = shrink(state, {"up/kernel": {1: [0, 4]}, "up/bias": {0: [0, 4]}})
    assert isinstance(small, nnx.State)
    expected = model.up(jnp.ones((1, 3)))[:, jnp.array([0, 4])]
    np.testing.assert_allclose(nnx.merge(graph, small).up(jnp.ones((1, 3))), expected)


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 6), min_size=1), st.sets(st.integers(0, 3), min_size=1), st.data())
def test_shrink_twice_is_shrink_once(rows, columns, data):
    rows, columns = sorted(rows), sorted(columns)
    again = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    tree = {"w": np.arange(28).reshape(7, 4)}
    twice = shrink(shrink(tree, {"w": {0: rows, 1: columns}}), {"w": {0: again}})
    once = shrink(tree, {"w": {1: columns, 0: [rows[i] for i in again]}})
    np.testing.assert_array_equal(twice["w"], once["w"])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"q/kernels": {0: [0]}}, "positions to keep of 'q/kernels', but no such parameter; near misses: q/kernel"),
        ({"q/kernel": {3: [0]}}, r"q/kernel: there is no axis 3 in shape \(2, 3, 4\)"),
        ({"q/kernel": {-1: [0]}}, "there is no axis -1 .* counted from 0"),
        ({"q/kernel": {0: []}}, "expected a list of positions to keep along axis 0"),
        ({"q/kernel": {0: np.array([[0]])}}, "expected a list of positions"),
        ({"q/kernel": {1: [0, 3]}}, r"positions 0 to 3 do not lie along axis 1 of shape \(2, 3, 4\)"),
        ({"q/kernel": {1: [-1, 0]}}, "positions -1 to 0 do not lie"),
        ({"q/kernel": {1: [1, 0]}}, "must ascend, none twice"),
        ({"q/kernel": {1: [1, 1]}}, "must ascend, none twice"),
        ({"q/kernel": {1: [True, False, True]}}, "are integers, got bool; np.flatnonzero"),
    ],
)
def test_refusals(keep, message):
    with pytest.raises(JpruneError, match=message):
        shrink(params(), keep)


# 2 KV heads (K) of 3 query heads (G) on one axis of q; up and gate fused on one axis, and one position more.
def member(path, axis, whole, length, stride=1, offset=0):
    return Member(path=path, axis=axis, whole=whole, length=length, stride=stride, offset=offset)


def group(name, size, *members, frozen=None):
    status = {"frozen": frozen, "proven": frozen is None, "evidence": frozen or "by hand"}
    return Group(name=name, size=size, members=members, renormalised=False, **status)


K = group("K", 2, member("q", 1, 6, 6, 3), member("k", 1, 2, 2))
G = group("G", 3, member("q", 1, 6, 6))
FF = group("FF", 2, member("up", 0, 5, 2), member("up", 0, 5, 2, 1, 2))
DIMS = group("D", 4, member("k", 0, 4, 4), frozen="an argument's axis, at f.py:3")
GROUPS = Groups((K, G, FF, DIMS), {}, lambda keep: None)
SHAPES = {"q": np.zeros((4, 6)), "k": np.zeros((4, 2)), "up": np.zeros(5)}


def test_keep():
    found = GROUPS.keep({"K": [1], "G": [0, 2], "FF": [1]})
    assert jax.tree.map(np.ndarray.tolist, found) == {"q": {1: [3, 5]}, "k": {1: [1]}, "up": {0: [1, 3, 4]}}
    assert jax.tree.map(np.ndarray.tolist, FF.keep(np.array([0]))) == {"up": {0: [0, 2, 4]}}
    assert GROUPS.keep({"K": [0, 1]})["q"][1].tolist() == list(range(6))
    assert DIMS.keep(range(4))["k"][0].tolist() == list(range(4))
    assert size(SHAPES) == 24 + 8 + 5
    assert size(SHAPES, found) == size(shrink(SHAPES, found)) == 8 + 4 + 3


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"D": [0]}, r"D cannot be pruned: an argument's axis, at f\.py:3"),
        ({"k": [0]}, "there is no group 'k'"),
        ({"K": [0, 2]}, "K has units 0 to 1, got 0 to 2"),
        ({"K": [-1, 0]}, "K has units 0 to 1, got -1 to 0"),
        ({"K": [1, 0]}, "K: units must ascend, none twice"),
        ({"K": []}, "K: expected a list of units to keep, at least one"),
        ({"K": np.array([0.5])}, "K: expected a list of units to keep"),
        ({"K": np.array([True, False])}, "K: units are integers, got bool; np.flatnonzero"),
    ],
)
def test_keep_refuses(units, message):
    with pytest.raises(JpruneError, match=message):
        GROUPS.keep(units)


def least_squares(x, kernel, stay):
    """The rows that stay, refitted in float64."""
    return np.linalg.lstsq(x[:, stay], x @ kernel, rcond=None)[0]


def gram(x):
    return Gram(jnp.asarray(np.swapaxes(x, -1, -2) @ x, jnp.float32), jnp.full(x.shape[:-2], x.shape[-2], jnp.int32))


def test_grams_refit_what_loses_inputs():
    """Heads of o and channels of stacked experts, each against least squares; what only writes is cut and no more."""
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(90, 12)) + rng.normal(size=(90, 2)) @ rng.normal(size=(2, 12))
    experts = rng.normal(size=(3, 60, 6)) + rng.normal(size=(3, 60, 1))
    experts[2] = 0  # no token was sent there
    before = {
        "v": {"kernel": jnp.ones((5, 3, 4))},
        "o": {"kernel": rng.normal(size=(3, 4, 5)).astype(np.float32)},
        "down": jnp.asarray(rng.normal(size=(3, 6, 5)), jnp.float32),
    }
    places = {
        "o/kernel": Place(path="o/kernel", in_axes=(0, 1)),
        "down": Place(path="down", in_axes=(1,), batch_axes=(0,)),
        "v/kernel": Place(path="v/kernel", in_axes=(0,)),
    }
    unseen = Gram(gram(experts).total, jnp.array([60, 60, 0], jnp.int32))
    grams = Observed(
        {"o/kernel": gram(heads), "down": Stacked(unseen), "v/kernel": gram(np.ones((9, 5)))},
        places,
    )
    keep = {"v/kernel": {1: [0, 2]}, "o/kernel": {0: [0, 2]}, "down": {1: [0, 3, 4, 5]}}
    after = shrink(before, keep, grams, damping=1e-6)
    expected = least_squares(heads, before["o"]["kernel"].reshape(12, 5), [0, 1, 2, 3, 8, 9, 10, 11])
    assert isinstance(after["o"]["kernel"], np.ndarray)
    np.testing.assert_allclose(after["o"]["kernel"], expected.reshape(2, 4, 5), atol=1e-3)
    for i in range(2):
        expected = least_squares(experts[i], np.asarray(before["down"][i]), [0, 3, 4, 5])
        np.testing.assert_allclose(after["down"][i], expected, atol=1e-3)
    np.testing.assert_array_equal(after["down"][2], before["down"][2, [0, 3, 4, 5]])
    np.testing.assert_array_equal(after["v"]["kernel"], before["v"]["kernel"][:, [0, 2]])
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, before))
    assert size(shrink(shapes, keep, grams)) == size(after)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["np", "jax"])
def test_each_kernel_of_a_stack_keeps_its_own(make):
    """As kernels by themselves; some go too, numbered as they were; positions of too few kernels are refused."""
    rng = np.random.default_rng(0)
    x, up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 60, 6), (3, 5, 6), (3, 6, 5)))
    stay = np.array([[0, 1, 5], [1, 2, 3], [0, 3, 4]])
    before = {"up": make(up), "down": make(down)}
    keep = {"up": {2: stay, 0: [0, 2]}, "down": {1: stay, 0: [0, 2]}}
    place = Place(path="down", in_axes=(1,), batch_axes=(0,))
    after = shrink(before, keep, Observed({"down": Stacked(gram(x))}, {"down": place}), damping=1e-6)
    for new, old in enumerate((0, 2)):
        np.testing.assert_array_equal(after["up"][new], up[old][:, stay[old]])
        np.testing.assert_allclose(after["down"][new], least_squares(x[old], down[old], stay[old]), atol=1e-3)
    assert type(after["up"]) is type(before["up"])
    assert size(before, keep) == size(after) == size(shrink(jax.eval_shape(lambda: before), keep))
    with pytest.raises(JpruneError, match="along axis 2 of each of 3 kernels, got 2 rows"):
        shrink(before, {"up": {2: stay[:2]}})
    with pytest.raises(JpruneError, match="must ascend"):
        shrink(before, {"up": {2: stay[:, ::-1]}})


def test_refuses_grams_that_do_not_fit():
    before = {"w": jnp.ones((4, 2)), "u": jnp.ones((3, 4))}
    keep, place = {"w": {0: [0, 1]}, "u": {1: [0, 1]}}, Place(path="w", in_axes=(0,))
    x = np.ones((5, 4))
    for grams, message in [
        ({"w": gram(x)}, "as jprune.observe"),
        (Observed({"w": SquaredNorm(jnp.ones(4), jnp.int32(5))}, {"w": place}), "got SquaredNorm"),
        (Observed({"w": Gram.zeros(4)}, {"w": place}), "no token"),
        (Observed({"u": gram(np.ones((5, 3)))}, {"u": Place(path="u", in_axes=(0,))}), "lose inputs, got those of u"),
    ]:
        with pytest.raises(JpruneError, match=message):
            shrink(before, keep, grams)
