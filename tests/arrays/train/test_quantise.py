"""int8 kernels against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jprune import trees
from jprune.train import quantise


@pytest.mark.parametrize(("shape", "in_axes"), [((30, 7), (0,)), ((3, 8, 7), (0, 1)), ((4, 9, 5), (1,))])
def test_half_a_step_for_each_output(rng, shape, in_axes):
    w = rng.standard_normal(shape).astype(np.float32) * rng.random(shape[-1]).astype(np.float32) * 10
    w[rng.random(shape) < 0.3] = 0
    w[..., 2] = 0  # an output that is pruned whole
    q = quantise.quantise(jnp.asarray(w), in_axes)
    assert q.values.dtype == jnp.int8
    step = np.abs(w).max(axis=in_axes, keepdims=True) / 127
    assert q.scale.shape == step.shape
    back = np.asarray(q.dequantise(jnp.float32))
    assert (np.abs(back - w) <= step / 2 * 1.001).all()
    assert (back[w == 0] == 0).all()
    np.testing.assert_allclose(np.abs(back).max(axis=in_axes), np.abs(w).max(axis=in_axes), rtol=1e-6)


def test_trees(rng):
    params = {"mlp": {"up": {"kernel": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)}}, "norm": jnp.ones(3)}
    small = quantise.quantise_tree(params, {"mlp/up/kernel": (0,)})
    assert set(trees.flatten(small)) == {"mlp/up/kernel/values", "mlp/up/kernel/scale", "norm"}
    back = quantise.dequantise_tree(small, jnp.bfloat16)
    assert back["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        back["mlp"]["up"]["kernel"].astype(jnp.float32), params["mlp"]["up"]["kernel"], atol=0.05
    )
    np.testing.assert_array_equal(back["norm"], 1)
