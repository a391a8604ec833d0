"""Importance against the slow truth, the loss that really changes, and what it must not depend on."""

import dataclasses

import handmade_groups
import jax
import jax.numpy as jnp
import numpy as np
import numpy_llm_pruner
import pytest

from jprune import trees
from jprune.errors import JpruneError
from jprune.structured import importance
from jprune.structured.kinds import block_units, hidden_units
from jprune.trace import ParamMatmul

HEADS, KV, HEAD_DIM, D, FF = 6, 2, 4, 5, 7
GROUPS, SHAPES, IN_AXES = handmade_groups.block(HEADS, KV, HEAD_DIM, D, FF)
MATMULS = [ParamMatmul(path=p, in_axes=axes, out_axes=(), stage=0, input_id=0) for p, axes in IN_AXES.items()]
ABSTRACT = trees.unflatten({p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in SHAPES.items()})
ATTENTION, QUERY, MLP = block_units(GROUPS, ABSTRACT, MATMULS, kinds=("attention", "query", "mlp"))
PROJECTIONS = {"attention": ("attn", "qkvo"), "query": ("attn", "qo"), "mlp": ("mlp", ("gate", "up", "down"))}


def draw(rng, dtype=jnp.float32):
    """(params, gradients, squares)."""

    def tree(f):
        return trees.unflatten({p: jnp.asarray(f(rng.normal(size=shape)), dtype) for p, shape in SHAPES.items()})

    return tree(lambda x: x), tree(lambda x: x), tree(np.square)


def truth(units, arrays, criterion, reduction):
    where, names = PROJECTIONS[units.kind]
    kernels = {name: tuple(tree[where][name]["kernel"] for tree in arrays) for name in names}
    return getattr(numpy_llm_pruner, units.kind)(kernels, criterion, reduction)


@pytest.mark.parametrize("reduction", importance.REDUCTIONS)
@pytest.mark.parametrize("criterion", importance.CRITERIA)
@pytest.mark.parametrize("units", [ATTENTION, QUERY, MLP], ids=lambda units: units.kind)
def test_against_loops(rng, units, criterion, reduction):
    arrays = draw(rng)
    found = importance.combine(units, importance.vectors(units, criterion, *arrays), reduction)
    np.testing.assert_allclose(found, truth(units, arrays, criterion, reduction), rtol=2e-5)


def test_the_fold_is_by_kv_head(rng):
    """What a query head says counts for its own KV head, and not for the one that the authors' program takes."""
    params, gradients, _ = draw(rng)
    gradients = jax.tree.map(jnp.zeros_like, gradients)
    gradients["attn"]["q"]["kernel"] = jnp.zeros((D, HEADS, HEAD_DIM)).at[:, 2].set(1.0)
    found = importance.combine(ATTENTION, importance.vectors(ATTENTION, "param_first", params, gradients))
    assert found[0] > 0
    assert found[1] == 0


@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_half_precision(rng, criterion):
    """Weights of bfloat16, gradients of float32: as if the rounded weights were float32."""
    params, gradients, squares = draw(rng)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    half, full = (importance.vectors(ATTENTION, criterion, p, gradients, squares) for p in (low, rounded))
    for i in full:
        np.testing.assert_allclose(half[i], full[i], rtol=1e-6)


def test_biases_and_norms_say_nothing_in_blocks(rng):
    arrays = draw(rng)
    changed = jax.tree.map(lambda x: x, arrays[0])
    changed["attn"]["q"]["bias"] = changed["attn"]["q"]["bias"] * 100
    changed["attn"]["q_norm"]["scale"] = changed["attn"]["q_norm"]["scale"] * 100
    a, b = (importance.vectors(ATTENTION, "l1", p) for p in (arrays[0], changed))
    np.testing.assert_array_equal(importance.combine(ATTENTION, a), importance.combine(ATTENTION, b))


def test_permuted_units(rng):
    """Units in another order have the same importance in that order."""
    params, gradients, _ = draw(rng)
    order = rng.permutation(FF)

    def permuted(tree):
        tree = jax.tree.map(lambda x: x, tree)
        for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
            tree["mlp"][name]["kernel"] = jnp.take(tree["mlp"][name]["kernel"], order, axis=axis)
        return tree

    before, after = (
        importance.combine(MLP, importance.vectors(MLP, "param_first", p, g))
        for p, g in ((params, gradients), (permuted(params), permuted(gradients)))
    )
    np.testing.assert_allclose(after, before[order], rtol=1e-6)


def hidden_of_two_blocks():
    """Units of the hidden dimension of two blocks and the ends; the model's parameters, abstract."""
    members, shapes, in_axes = [], {}, {}
    residual = GROUPS[-1]
    for i in range(2):
        members += [dataclasses.replace(m, path=f"blocks/{i}/{m.path}") for m in residual.members]
        shapes |= {f"blocks/{i}/{p}": shape for p, shape in SHAPES.items()}
        in_axes |= {f"blocks/{i}/{p}": axes for p, axes in IN_AXES.items()}
    shapes |= {"embed/embedding": (11, D), "final_norm/scale": (D,), "head/kernel": (D, 11)}
    in_axes |= {"head/kernel": (0,)}
    members += handmade_groups.group(
        "", D, ("embed/embedding", 1, D), ("final_norm/scale", 0, D), ("head/kernel", 0, D)
    ).members
    status = {"frozen": None, "proven": True, "evidence": "by hand"}
    group = handmade_groups.Group(name="hidden", size=D, members=tuple(members), renormalised=True, **status)
    matmuls = [ParamMatmul(path=p, in_axes=axes, out_axes=(), stage=0, input_id=0) for p, axes in in_axes.items()]
    abstract = trees.unflatten({p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in shapes.items()})
    return hidden_units([group], abstract, matmuls), shapes


def test_hidden_block_by_block(rng):
    """Collected one block at a time, from the last: the same as at once, and as plain sums."""
    units, shapes = hidden_of_two_blocks()
    params, gradients = ({p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()} for _ in range(2))
    at_once = importance.combine(units, importance.vectors(units, "param_first", params, gradients))
    collected = {}
    for prefix in ("blocks/1", "blocks/0", ""):
        parts = [
            {
                p.removeprefix(f"{prefix}/"): x
                for p, x in tree.items()
                if p.startswith(prefix) and (prefix or p[0] != "b")
            }
            for tree in (params, gradients)
        ]
        collected |= importance.vectors(units, "param_first", *map(trees.unflatten, parts), prefix=prefix)
    np.testing.assert_array_equal(importance.combine(units, collected), at_once)
    plain = np.zeros(D)
    for path, shape in shapes.items():
        if D in shape and not path.endswith("bias"):
            salience = np.abs(np.asarray(params[path], np.float64) * np.asarray(gradients[path], np.float64))
            plain += salience.sum(tuple(i for i in range(len(shape)) if i != shape.index(D)))
    np.testing.assert_allclose(at_once, plain, rtol=1e-5)
    del collected[0]
    with pytest.raises(JpruneError, match="hidden: nothing was collected from blocks/0/attn/q/kernel"):
        importance.combine(units, collected)


def test_random():
    drawn = importance.random(MLP.at("blocks/3"), 42)
    np.testing.assert_array_equal(drawn, importance.random(MLP.at("blocks/3"), 42))
    assert len(set(drawn)) == FF
    assert not np.array_equal(drawn, importance.random(MLP.at("blocks/4"), 42))
    assert not np.array_equal(drawn, importance.random(MLP.at("blocks/3"), 43))


def test_missing_gradients(rng):
    params, gradients, squares = draw(rng)
    with pytest.raises(JpruneError, match="param_first needs gradients"):
        importance.vectors(MLP, "param_first", params)
    with pytest.raises(JpruneError, match="param_second needs gradients"):
        importance.vectors(MLP, "param_second", params, gradients)
    importance.vectors(MLP, "param_second", params, None, squares)
    small = jax.tree.map(lambda x: x[:1], params)
    with pytest.raises(JpruneError, match=r"mlp/gate/kernel: the units are those of shape \(5, 7\), .* \(1, 7\)"):
        importance.vectors(MLP, "l1", small)


def mlp_loss(params, example):
    x, y = example
    h = jax.nn.silu(x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])
    return jnp.mean((h @ params["down"]["kernel"] - y) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mean_and_square(rng, dtype):
    params = draw(rng, dtype)[0]["mlp"]
    examples = tuple(jnp.asarray(rng.normal(size=(4, 3, D)), dtype) for _ in range(2))
    mean, square = importance.mean_and_square(mlp_loss, params, examples)
    each = [jax.jit(jax.grad(mlp_loss))(params, example) for example in zip(*examples)]
    each = [jax.tree.map(lambda g: np.asarray(g, np.float64), gradient) for gradient in each]
    for path, found in trees.flatten(mean).items():
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, np.mean([trees.flatten(g)[path] for g in each], 0), rtol=2e-4, atol=1e-6)
        squares = np.mean([trees.flatten(g)[path] ** 2 for g in each], 0)
        np.testing.assert_allclose(trees.flatten(square)[path], squares, rtol=2e-4, atol=1e-6)
    assert importance.mean_and_square(mlp_loss, params, examples, squares=False)[1] is None


def test_first_order_is_the_change_of_the_loss(rng):
    """Weights near zero: the loss changes by minus the sum of w g when a channel goes, and vectorize knows it.

    With a unit's weights scaled by t, loss(1) - loss(1 - t) = t * sum w g to first order.
    """
    params = jax.tree.map(lambda x: x * 0.3, draw(rng)[0]["mlp"])
    examples = tuple(jnp.asarray(rng.normal(size=(3, 4, D)), jnp.float32) for _ in range(2))

    def loss(p):
        return float(np.mean([mlp_loss(p, example) for example in zip(*examples)], dtype=np.float64))

    gradient, _ = importance.mean_and_square(mlp_loss, params, examples, squares=False)
    t = 1e-2
    for unit in range(FF):

        def scaled(s, unit=unit):
            factors = jnp.ones(FF).at[unit].set(s)
            return {
                "gate": {"kernel": params["gate"]["kernel"] * factors},
                "up": {"kernel": params["up"]["kernel"] * factors},
                "down": {"kernel": params["down"]["kernel"] * factors[:, None]},
            }

        change = (loss(scaled(1 + t)) - loss(scaled(1 - t))) / (2 * t)
        flat = [params[n]["kernel"] * gradient[n]["kernel"] for n in ("gate", "up", "down")]
        first = float(flat[0][:, unit].sum() + flat[1][:, unit].sum() + flat[2][unit].sum())
        np.testing.assert_allclose(change, first, rtol=2e-2, atol=2e-4)
        # Of an output channel w g sums to what the whole channel says: vectorize is its absolute value.
        tree = {"mlp": params}, {"mlp": gradient}
        down = importance.vectors(MLP, "vectorize", *tree)[[m.path for m in MLP.members].index("mlp/down/kernel")]
        np.testing.assert_allclose(down[unit, 0], abs(float(flat[2][unit].sum())), rtol=1e-5)


def test_block_influence(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    y = rng.normal(size=(2, 3, 4)).astype(np.float32)
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x.reshape(-1, 4), y.reshape(-1, 4))]
    np.testing.assert_allclose(
        importance.block_influence(jnp.asarray(x), jnp.asarray(y)), 1 - np.mean(cosines), rtol=1e-5
    )
    for scale, expected in ((3.0, 0.0), (-1.0, 2.0), (0.0, 1.0)):
        np.testing.assert_allclose(
            importance.block_influence(jnp.asarray(x), jnp.asarray(x * scale)), expected, atol=1e-6
        )
    low = importance.block_influence(jnp.asarray(x, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, 0, atol=1e-6)
