"""Statistics of matmul inputs equal those that forward hooks give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.errors import JpruneError
from jprune.statistics import Gram, SquaredNorm
from jprune.trace import observe


def as_rows(x, d_in):
    return np.asarray(x, np.float32).reshape(-1, d_in)


def test_inputs_are_those_of_a_forward_hook(architecture, rows):
    a = architecture
    output, seen = jax.jit(observe(a.f, rows))(a.params, a.x)
    expected = a.hook(a.params, a.x)
    assert seen.keys() == expected.keys() == {path for stage in a.stages for path in stage}
    np.testing.assert_allclose(output, a.f(a.params, a.x), atol=1e-2 if "params" in a.params else 1e-5)
    for path, x in expected.items():
        # What is bfloat16 may differ by a rounding between the fused and the eager computation.
        tolerance = 2e-2 if x.dtype == jnp.bfloat16 or "params" in a.params else 1e-5
        np.testing.assert_allclose(seen[path].x, as_rows(x, seen[path].x.shape[1]), atol=tolerance, err_msg=path)


def test_gram_by_hand():
    def f(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    p = {"a": jnp.array([[1.0, -1.0], [0.0, 1.0]]), "b": jnp.ones((2, 1))}
    x = jnp.array([[[1.0, 2.0], [3.0, 0.0]]])
    output, seen = observe(f, Gram)(p, x)
    np.testing.assert_array_equal(output, [[[2.0], [3.0]]])
    np.testing.assert_array_equal(seen["a"].total, [[10.0, 2.0], [2.0, 4.0]])
    np.testing.assert_array_equal(seen["b"].total, [[10.0, 1.0], [1.0, 1.0]])
    assert seen["a"].tokens == 2


def test_statistics_of_a_parameter_used_twice_add(rng, rows):
    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    p = {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    _, seen = observe(f, rows)(p, x)
    np.testing.assert_allclose(seen["w"].x, np.concatenate([x, np.tanh(x @ p["w"])]), atol=1e-6)


def test_columns_follow_the_axes_of_the_leaf(rng, rows):
    """The kernel is stored as [head_dim, d_out, heads] and summed over both ends, whatever the input's layout."""

    def f(p, x):
        return jnp.einsum("btnk,kdn->btd", x, p["w"])

    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    p = {"w": jnp.asarray(rng.normal(size=(5, 6, 4)), jnp.float32)}
    output, seen = observe(f, rows)(p, x)
    kernel = p["w"].transpose(0, 2, 1).reshape(20, 6)  # in_axes (0, 2), then out_axes (1,)
    np.testing.assert_allclose((seen["w"].x @ kernel).reshape(output.shape), output, rtol=1e-5)


def test_a_kernel_that_is_read_elsewhere_too_is_left_out_with_a_warning(rows):
    """Of a tied embedding, a Gram of what the head reads would not be all that its values are for."""

    def f(p, tokens):
        return p["embedding"][tokens] @ p["w"] @ p["embedding"].T

    args = {"embedding": jnp.ones((7, 3)), "w": jnp.ones((3, 3))}, jnp.array([[2, 5]])
    with pytest.warns(
        UserWarning, match=r"70 % of the parameters are left out; the largest is embedding: .*\(gather\)"
    ):
        _, seen = observe(f, rows)(*args)
    assert list(seen) == ["w"]
    assert list(observe(f, rows, where="w")(*args)[1]) == ["w"]
    with pytest.raises(JpruneError, match=r"found only embedding; .*also read elsewhere"):
        observe(f, rows, where="emb")(*args)


def test_one_parameter_along_two_axes_is_refused(rows):
    def f(p, x):
        return x @ p["w"] @ p["w"].T

    args = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))
    with pytest.raises(JpruneError, match=r"its matmuls sum over different axes, \(0,\) and \(1,\)"):
        observe(f, rows, where="w")(*args)


def test_keywords_and_arguments_that_are_no_arrays(rows):
    def f(p, x, kind, *, scale=1, act=None):
        assert isinstance(scale, int)
        return {"plain": lambda x: x}[kind](act(x) if act else x) @ p["w"] * scale

    args = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)), "plain"
    output, seen = observe(f, rows)(*args, scale=3, act=jnp.tanh)
    np.testing.assert_allclose(output, f(*args, scale=3, act=jnp.tanh))
    np.testing.assert_allclose(seen["w"].x, np.tanh(np.ones((2, 3))))


def test_padding_does_not_count(rng):
    def f(p, x):
        return jnp.einsum("btnk,nkd->btd", jax.nn.relu(x @ p["a"]).reshape(2, 5, 2, 3), p["b"])

    p = {"a": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "b": jnp.ones((2, 3, 4))}
    x = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    real = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    _, seen = observe(f, Gram, weights=real)(p, x)
    rows = np.asarray(x)[real == 1]
    hidden = np.maximum(rows @ np.asarray(p["a"]), 0)
    np.testing.assert_allclose(seen["a"].total, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen["b"].total, hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    assert seen["a"].tokens == 6
    with pytest.raises(JpruneError, match=r"a: weights of shape \(5, 2\) do not say which of its inputs"):
        observe(f, Gram, weights=real.T)(p, x)


def test_where(architecture):
    a = architecture
    _, seen = observe(a.f, SquaredNorm, where="down")(a.params, a.x)
    assert list(seen) == a.stages[-1][-1:]
    assert seen[a.stages[-1][-1]].total.shape == (24,)


def test_shapes_alone(architecture):
    a = architecture
    output, seen = jax.eval_shape(observe(a.f, Gram), a.params, a.x)
    assert output.shape == a.x.shape
    assert {s.total.shape for s in seen.values()} <= {(16, 16), (24, 24)}


def test_under_shard_map(rng):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def f(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    def local(p, x):
        _, seen = observe(f, SquaredNorm)(p, x)
        return jax.tree.map(lambda s: jax.lax.psum(s, "data"), {path: s.total for path, s in seen.items()})

    p = {n: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for n in "ab"}
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    totals = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()))(p, x)
    for path, statistic in observe(f, SquaredNorm)(p, x)[1].items():
        np.testing.assert_allclose(totals[path], statistic.total, rtol=1e-5)
