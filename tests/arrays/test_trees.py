"""Paths, matrix views, filters, masks over trees, and counting zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import trees
from jprune.errors import JpruneError

NAMES = st.text("abk_01", min_size=1, max_size=3)
NESTED = st.recursive(
    st.integers(0, 99).map(np.int64), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@settings(deadline=None, max_examples=50)
@given(NESTED)
def test_flatten_and_back(tree):
    flat = trees.flatten(tree)
    assert trees.unflatten(flat) == tree
    assert trees.replace(tree, flat) == tree
    assert len(flat) == len(jax.tree.leaves(tree))


def test_paths_of_every_container():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Linear(3, 2, rngs=rngs)

    module = Module(nnx.Rngs(0))
    assert list(trees.flatten(module)) == ["q/bias", "q/kernel"]
    assert list(trees.flatten(nnx.state(module))) == ["q/bias", "q/kernel"]
    assert list(trees.flatten({"params": {"q": [np.ones(1), (np.ones(2),)]}})) == ["params/q/0", "params/q/1/0"]


def test_replace_keeps_the_containers():
    tree = {"a": [np.int8(1), (np.int8(2), np.int8(3))], "b": None}
    assert trees.replace(tree, {"a/0": 10, "a/1/0": 20, "a/1/1": 30}) == {"a": [10, (20, 30)], "b": None}


@pytest.mark.parametrize(
    ("shape", "in_axes"),
    [((6, 4), (0,)), ((6, 4), (1,)), ((6, 2, 3), (0,)), ((2, 3, 6), (0, 1)), ((2, 3, 4, 5), (2, 0)), ((2, 3, 4), (1,))],
)
def test_matrix_view(rng, shape, in_axes):
    """Contracting the kernel over its input axes is a matmul with its matrix view."""
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    matrix = trees.to_matrix(kernel, in_axes)
    x = rng.normal(size=[shape[axis] for axis in in_axes])
    expected = np.tensordot(x, np.asarray(kernel), (range(len(in_axes)), in_axes)).reshape(-1)
    np.testing.assert_allclose(x.reshape(-1) @ np.asarray(matrix), expected, rtol=1e-5)
    np.testing.assert_array_equal(trees.from_matrix(matrix, shape, in_axes), kernel)


def test_leading_axes():
    assert trees.leading_axes((12, 4, 2), 12, "q") == (0,)
    assert trees.leading_axes((4, 3, 10), 12, "o") == (0, 1)
    assert trees.leading_axes((12, 1), 12, "one output") == (0,)
    assert trees.leading_axes((1, 12, 1, 5), 12, "axes of one") == (0, 1)
    assert trees.leading_axes((4, 3, 12), None, "o") == (0,)
    for shape, said in (
        ((12, 12), r"\(0,\) or \(1,\)"),
        ((4, 3, 12), r"\(2,\) or \(0, 1\)"),
        ((12, 3, 4), r"\(1, 2\)"),
    ):
        with pytest.raises(JpruneError, match=rf"o: its statistic has 12 inputs, .*{said} may be"):
            trees.leading_axes(shape, 12, "o")
    with pytest.raises(JpruneError, match=r"o: no leading axes of shape \(4, 3, 12\) make the 5 inputs"):
        trees.leading_axes((4, 3, 12), 5, "o")
    with pytest.raises(JpruneError, match=r"scale: .* shape is \(12,\)"):
        trees.leading_axes((12,), None, "scale")


PATHS = ["blocks/0/attn/q/kernel", "blocks/0/attn/o/kernel", "blocks/1/attn/q/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("where", "skip", "chosen"),
    [
        (None, (), PATHS),
        ("kernel$", (), PATHS),
        ("attn", (), PATHS[:3]),
        (["head", "q/"], (), [PATHS[0], PATHS[2], PATHS[3]]),
        (None, "head", PATHS[:3]),
        ("blocks", ["/o/", r"^blocks/1/"], PATHS[:1]),
        (r"blocks/\d+/attn/[qo]", "blocks", []),
    ],
)
def test_choose(where, skip, chosen):
    assert trees.choose(PATHS, where, skip) == chosen


@pytest.mark.parametrize("filters", [{"where": ["attn", "blocks/0/atn/q"]}, {"skip": "blocks/0/atn/q"}])
def test_filters_that_find_nothing_list_near_misses(filters):
    with pytest.raises(JpruneError, match=r"'blocks/0/atn/q' matches none of the 4 .*: blocks/0/attn/q/kernel, "):
        trees.choose(PATHS, **filters)


def test_not_a_regular_expression():
    with pytest.raises(JpruneError, match=r"'q\(' is not a regular expression"):
        trees.choose(PATHS, "q(")


PARAMS = {
    "q": {"kernel": jnp.arange(1.0, 7).reshape(2, 3), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.ones(4, jnp.bfloat16)},
}
MASK = jnp.array([[True, False, True], [False, True, True]])
MASKED = np.array([[1.0, 0, 3], [0, 5, 6]])


@pytest.mark.parametrize(
    "masks",
    [
        {"q": {"kernel": MASK, "bias": None}, "norm": {"scale": None}},
        {"q": {"kernel": MASK, "bias": None}, "norm": None},
        {"q": {"kernel": MASK}},
        {"q/kernel": MASK},
    ],
    ids=["tree", "subtree of None", "left out", "by path"],
)
def test_apply_masks(masks):
    for apply in (trees.apply_masks, jax.jit(trees.apply_masks)):
        result = apply(PARAMS, masks)
        assert jax.tree.structure(result) == jax.tree.structure(PARAMS)
        np.testing.assert_array_equal(result["q"]["kernel"], MASKED)
        np.testing.assert_array_equal(result["q"]["bias"], PARAMS["q"]["bias"])
        assert result["norm"]["scale"].dtype == jnp.bfloat16


def test_apply_masks_to_everything_and_nothing():
    everything = trees.apply_masks(PARAMS, jax.tree.map(lambda p: jnp.zeros(p.shape, bool), PARAMS))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(everything))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), trees.apply_masks(PARAMS, {}), PARAMS)
    assert jax.tree.map(lambda p: p.dtype, everything) == jax.tree.map(lambda p: p.dtype, PARAMS)


def test_apply_masks_to_nnx_state():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    result = trees.apply_masks(state, {"kernel": MASK})
    assert isinstance(result, nnx.State)
    np.testing.assert_array_equal(np.asarray(trees.flatten(result)["kernel"]) != 0, MASK)


def test_pruned_nan_becomes_zero():
    """A pruned weight is zero whatever it was; 0 x NaN is not."""
    result = trees.apply_masks({"kernel": jnp.full((2, 3), jnp.nan)}, {"kernel": MASK})
    np.testing.assert_array_equal(np.isnan(result["kernel"]), MASK)


def test_masks_that_do_not_fit():
    with pytest.raises(JpruneError, match="mask for 'q/kernl' but no such parameter; near misses: q/kernel"):
        trees.apply_masks(PARAMS, {"q/kernl": MASK})
    with pytest.raises(JpruneError, match=r"q/kernel: the mask's shape is \(3, 2\), the parameter's \(2, 3\)"):
        trees.apply_masks(PARAMS, {"q/kernel": MASK.T})


def test_sparsity():
    pruned = trees.apply_masks(PARAMS, {"q/kernel": MASK})
    counted = trees.sparsity(pruned)
    assert (counted.zeros, counted.prunable_parameters, counted.total_parameters) == (2, 6, 13)
    assert counted.achieved == 2 / 6
    assert str(counted) == "33.3 % of 6 prunable (15.4 % of 13)"
    assert trees.sparsity(pruned, where=None).prunable_parameters == 13
    assert trees.sparsity(pruned, where=["bias", "scale"]).zeros == 0
    with pytest.raises(JpruneError, match="matches none of the 3"):
        trees.sparsity(pruned, where="embedding")


def test_sparsity_is_printed_with_both_denominators():
    assert str(trees.Sparsity(53_084_160, 106_168_320, 134_515_008)) == "50.0 % of 106.2 M prunable (39.5 % of 134.5 M)"
    assert str(trees.Sparsity(0, 6_476_000_000, 6_738_000_000)) == "0.0 % of 6.476 B prunable (0.0 % of 6.738 B)"
    assert str(trees.Sparsity(1, 2000, 2500)) == "0.1 % of 2 k prunable (0.0 % of 2.5 k)"
    assert str(trees.Sparsity(0, 0, 0)) == "0.0 % of 0 prunable (0.0 % of 0)"


def test_what_is_no_array_stays_where_it_is():
    """Modules of Equinox have functions and other things among their leaves."""
    tree = {"layer": {"kernel": jnp.ones((2, 3)), "activation": jax.nn.relu, "name": "first", "size": 3, "bias": None}}
    assert list(trees.flatten(tree)) == ["layer/kernel"]
    pruned = trees.apply_masks(tree, {"layer/kernel": MASK})
    assert pruned["layer"] | {"kernel": 0} == tree["layer"] | {"kernel": 0}
    np.testing.assert_array_equal(pruned["layer"]["kernel"], MASK)
    counted = trees.sparsity(pruned)
    assert (counted.zeros, counted.total_parameters) == (2, 6)


def test_kernels_are_the_nearer_misses():
    leaves = {
        "attn/q/bias": jnp.ones(3),
        "attn/q/kernal": jnp.ones(3),
        "attn/ids": jnp.ones((3, 3), jnp.int32),
        "mlp/up/weight": jnp.ones((3, 3)),
        "mlp/down/weight": jnp.ones((3, 3), jnp.bfloat16),
    }
    near = r"near misses: mlp/(up|down)/weight, mlp/(up|down)/weight, attn/q/kernal"
    with pytest.raises(JpruneError, match=rf"'attn/q/kernel' matches none of the 5 leaves; {near}"):
        trees.choose(leaves, "attn/q/kernel")
    with pytest.raises(JpruneError, match="matches none of the 0 kernels; there are none at all"):
        trees.choose([], "kernel$")
