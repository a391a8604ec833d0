"""Pruned weights stay exactly zero, whatever the optimizer does; the others are trained as ever."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.errors import JpruneError
from jprune.train.keep_masked import keep_masked, pack, unpack


def setup(rng, dtype=jnp.float32):
    params = {
        "w": jnp.asarray(rng.standard_normal((5, 13)), dtype),
        "stack": jnp.asarray(rng.standard_normal((2, 3, 8)), dtype),
        "bias": jnp.zeros(4, dtype),
    }
    masks = {"w": rng.random((5, 13)) < 0.5, "stack": rng.random((2, 3, 8)) < 0.3}
    return params, masks


OPTIMIZERS = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.1, weight_decay=0.3),
    "lion": optax.lion(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exactly_zero_and_the_rest_as_without(rng, name, dtype):
    params, masks = setup(rng, dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.02}
    assert (np.asarray(params["w"])[~masks["w"]] != 0).all()  # even what is not zero at first becomes so
    plain, kept = OPTIMIZERS[name], optax.chain(OPTIMIZERS[name], jprune.keep_masked(masks))

    def train(tx):
        @jax.jit
        def step(params, state):
            grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole numbers
                updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        p, state = params, jax.jit(tx.init)(params)
        for _ in range(3):
            p, state = step(p, state)
        return p

    free, got = train(plain), train(kept)
    for path, mask in masks.items():
        assert got[path].dtype == dtype
        assert (np.asarray(got[path])[~mask] == 0).all()
        a, b = (np.asarray(tree[path], np.float32)[mask] for tree in (got, free))
        np.testing.assert_allclose(a, b, **close)
    np.testing.assert_allclose(got["bias"].astype(jnp.float32), free["bias"].astype(jnp.float32), **close)


def test_one_bit_a_weight(rng):
    for shape in [(3, 17), (8,), (2, 5, 64), (1, 1), ()]:
        mask = rng.random(shape) < 0.5
        packed = pack(jnp.asarray(mask))
        assert packed.size == np.prod(shape[:-1], dtype=int) * -(-(shape[-1] if shape else 1) // 8)
        np.testing.assert_array_equal(unpack(packed, shape), mask)
    params, masks = setup(rng)
    state = keep_masked(masks).init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 5 * 2 + 2 * 3


def test_trees_of_masks_and_sharding(rng):
    """Masks in a tree with None, and a state that is cut over devices."""
    params, masks = setup(rng)
    tx = keep_masked({**masks, "bias": None})
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    state = jax.device_put(tx.init(params), jax.NamedSharding(mesh, jax.P()))
    sharded = jax.device_put(params["stack"], jax.NamedSharding(mesh, jax.P(None, None, "fsdp")))
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P())) | {"stack": sharded}
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    new = optax.apply_updates(params, updates)
    assert (np.asarray(new["stack"])[~masks["stack"]] == 0).all()


def test_bad_masks(rng):
    params, masks = setup(rng)
    with pytest.raises(JpruneError, match="mask for 'v' but no such parameter"):
        keep_masked({"v": masks["w"]}).init(params)
    with pytest.raises(JpruneError, match=r"w: expected a bool mask \(5, 13\), got bool \(2, 3, 8\)"):
        keep_masked({"w": masks["stack"]}).init(params)
    with pytest.raises(JpruneError, match="needs the parameters"):
        keep_masked(masks).update(params, keep_masked(masks).init(params))
