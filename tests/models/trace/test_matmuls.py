"""Which matmuls are found, on which axes of which leaf; and what is left out or refused, with which words."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.sparse import BCOO

from jprune.errors import JpruneError
from jprune.trace import matmuls, skipped


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def table(found):
    return [(m.path, m.in_axes, m.out_axes, m.stage, m.input_id) for m in found]


def only(f, w, x):
    """in_axes, out_axes of the single matmul of f against a parameter of shape w."""
    (m,) = matmuls(f, {"w": shape(*w)}, shape(*x))
    return m.in_axes, m.out_axes


def test_stages_and_shared_inputs(architecture):
    found = matmuls(architecture.f, architecture.params, architecture.x)
    stages = [[m.path for m in found if m.stage == s] for s in range(len(architecture.stages))]
    assert list(map(set, stages)) == list(map(set, architecture.stages))
    assert len(found) == sum(map(len, stages))
    for s, paths in enumerate(architecture.stages):
        ids = {m.input_id for m in found if m.stage == s}
        assert len(ids) == (2 if "o/kernel" in paths and "down/kernel" in paths else 1)


def test_head_axes_of_nnx(architecture):
    by_path = {m.path: m for m in matmuls(architecture.f, architecture.params, architecture.x)}
    if "q/kernel" in by_path:
        assert (by_path["q/kernel"].in_axes, by_path["q/kernel"].out_axes) == ((0,), (1, 2))
        assert (by_path["o/kernel"].in_axes, by_path["o/kernel"].out_axes) == ((0, 1), (2,))


@pytest.mark.parametrize(
    ("f", "w", "x", "axes"),
    [
        (lambda p, x: x @ p["w"], (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: x @ p["w"].T, (6, 4), (2, 4), ((1,), (0,))),
        (lambda p, x: p["w"] @ x, (6, 4), (4, 2), ((1,), (0,))),
        (lambda p, x: p["w"].T @ x, (4, 6), (4,), ((0,), (1,))),
        (lambda p, x: x @ p["w"], (4,), (2, 4), ((0,), ())),
        (lambda p, x: x @ p["w"], (1, 6), (2, 1), ((0,), (1,))),
        (lambda p, x: x @ p["w"].reshape(6), (6, 1), (2, 6), ((0,), (1,))),
        (lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32), (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: jnp.matmul(x[None], p["w"][None])[0], (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: x @ p["w"].reshape(4, 6), (4, 2, 3), (2, 4), ((0,), (1, 2))),
        (lambda p, x: x @ p["w"].reshape(6, 4), (2, 3, 4), (2, 6), ((0, 1), (2,))),
        (lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"].reshape(2, 3, 4)), (6, 4), (5, 2, 3), ((0,), (1,))),
        (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (4, 2, 3), (2, 4), ((0,), (1, 2))),
        (lambda p, x: jnp.einsum("bhk,khd->bd", x, p["w"]), (3, 2, 4), (5, 2, 3), ((0, 1), (2,))),
        (lambda p, x: x @ jax.lax.stop_gradient(jnp.copy(p["w"])), (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: x @ jax.lax.optimization_barrier((p["w"], x))[0], (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: jax.jit(jax.remat(jnp.matmul))(x, p["w"]), (4, 6), (2, 4), ((0,), (1,))),
        (lambda p, x: jax.vmap(jnp.matmul, (0, None))(x, p["w"]), (4, 6), (3, 2, 4), ((0,), (1,))),
        (lambda p, x: jax.nn.relu(jax.nn.silu(x) @ p["w"]), (4, 6), (2, 4), ((0,), (1,))),
    ],
)
def test_axes_are_those_of_the_leaf(f, w, x, axes):
    assert only(f, w, x) == axes


def test_through_custom_derivatives():
    @jax.custom_vjp
    def matmul(x, w):
        return x @ w

    matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))

    @jax.custom_jvp
    def again(x, w):
        return matmul(x, w)

    again.defjvp(lambda primals, tangents: (again(*primals), tangents[0] @ primals[1]))
    assert only(lambda p, x: again(x, p["w"]), (4, 6), (2, 4)) == ((0,), (1,))


def test_sharding_constraints_are_transparent():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding)
    f = lambda p, x: (constrain(x) @ constrain(p["w"]), x @ p["v"])  # noqa: E731
    found = matmuls(f, {"v": shape(4, 6), "w": shape(4, 6)}, shape(2, 4))
    assert table(found) == [("w", (0,), (1,), 0, 0), ("v", (0,), (1,), 0, 0)]


def test_casts_of_one_value_are_one_input():
    def f(p, x):
        return x.astype(jnp.bfloat16) @ p["a"], x.astype(jnp.bfloat16) @ p["b"], x @ p["c"].astype(jnp.float32)

    half = functools.partial(shape, dtype=jnp.bfloat16)
    found = matmuls(f, {"a": half(4, 4), "b": half(4, 4), "c": half(4, 4)}, shape(2, 4))
    assert [m.input_id for m in found] == [0, 0, 1]


def test_views_of_one_value_are_one_input_if_the_features_are_the_same():
    def f(p, x):  # [2, 3, 4]
        return x @ p["a"], x.reshape(6, 4) @ p["b"], x.transpose(1, 0, 2) @ p["c"], x.transpose(2, 0, 1) @ p["d"]

    found = matmuls(f, {n: shape(3 if n == "d" else 4, 5) for n in "abcd"}, shape(2, 3, 4))
    assert [m.input_id for m in found] == [0, 0, 0, 1]


def test_tied_and_twice_used_parameters():
    def f(p, tokens):
        x = p["embedding"][tokens]
        return jnp.tanh(x @ p["w"]) @ p["w"] @ p["embedding"].T

    found = matmuls(f, {"embedding": shape(7, 4), "w": shape(4, 4)}, shape(2, 3, dtype=jnp.int32))
    assert table(found) == [("w", (0,), (1,), 0, 0), ("w", (0,), (1,), 1, 1)]
    (left,) = skipped(f, {"embedding": shape(7, 4), "w": shape(4, 4)}, shape(2, 3, dtype=jnp.int32))
    assert left.paths == ("embedding",)
    both = matmuls(f, {"embedding": shape(7, 4), "w": shape(4, 4)}, shape(2, 3, dtype=jnp.int32), partial=True)
    assert table(both)[2] == ("embedding", (1,), (0,), 2, 2)
    assert re.search(r"is also read elsewhere \(gather\) at .*test_matmuls.py", left.reason)


def test_the_stage_is_the_longest_path():
    def f(p, x):
        return (x @ p["a"] @ p["b"] + x) @ p["c"] + x @ p["d"]

    found = matmuls(f, {n: shape(4, 4) for n in "abcd"}, shape(2, 4))
    assert [(m.path, m.stage) for m in found] == [("a", 0), ("b", 1), ("c", 2), ("d", 0)]
    found = matmuls(f, {n: shape(4, 4) for n in "abcd"}, shape(2, 4), where="[bcd]")
    assert [(m.path, m.stage) for m in found] == [("b", 0), ("c", 1), ("d", 0)]


def test_what_the_output_does_not_need_is_no_matmul():
    def f(p, x):
        x @ p["dead"]
        return x @ p["w"]

    assert [m.path for m in matmuls(f, {"dead": shape(4, 4), "w": shape(4, 4)}, shape(2, 4))] == ["w"]


def test_products_of_parameters_are_no_matmuls_of_values():
    def f(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    params = {"w": shape(4, 4), "a": shape(4, 2), "b": shape(2, 4)}
    assert matmuls(f, params, shape(2, 4)) == ()
    (left,) = skipped(f, params, shape(2, 4))
    assert left.paths == ("a", "b", "w")
    assert "made by add at" in left.reason
    assert "test_matmuls.py" in left.source


@pytest.mark.parametrize(
    ("f", "w", "x", "reason"),
    [
        (
            lambda p, x: x @ p["w"][:, ::2],
            (4, 6),
            (2, 4),
            "no view of a parameter, but a slice with str.* at .*test_mat",
        ),
        (lambda p, x: x @ (p["w"] * 2), (4, 6), (2, 4), "made by mul"),
        (lambda p, x: x @ p["w"].reshape(3, 8), (4, 6), (2, 3), "made by reshape"),
        (lambda p, x: x @ jnp.repeat(p["w"], 2, axis=0), (2, 6), (2, 4), "it sums over copies of the kernel"),
        (lambda p, x: x @ p["w"].reshape(1, 6), (6,), (2, 1), "sums over no axis"),
        (lambda p, x: jnp.einsum("t,d->td", x, p["w"], preferred_element_type=jnp.float32), (4,), (2,), "sums over no"),
        (lambda p, x: x @ (p["w"] * x[0, 0]), (4, 6), (2, 4), "its kernel depends on an argument: mul at .*test_mat"),
        (lambda p, x: x @ jnp.where(x > 0, p["w"], 0), (4, 4), (4, 4), "depends on an argument: select_n at"),
        (lambda p, x: jnp.sum(x[:, :, None] * p["w"], axis=1), (4, 6), (2, 4), "multiplied element by element and sum"),
        (lambda p, x: jnp.linalg.solve(p["w"], x), (4, 4), (4, 2), "custom_linear_solve reads it"),
        (lambda p, x: x @ jax.lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: -p["w"]), (4, 4), (2, 4), "cond at"),
        (lambda p, x: jnp.fft.fft(x + p["w"] @ x).real + jnp.fft.fft(p["w"]).real, (4, 4), (4, 4), "read elsewhere"),
        (lambda p, x: x @ p["w"] + jnp.sum(p["w"]), (4, 4), (4, 4), r"also read elsewhere \(add\)"),
        (lambda p, x: x @ p["w"][:, :3] + x @ p["w"][:, 2:5], (4, 6), (4, 4), "parts of it that overlap"),
    ],
)
def test_left_out(f, w, x, reason):
    params = {"w": shape(*w)}
    assert matmuls(f, params, shape(*x)) == ()
    assert {s.paths for s in skipped(f, params, shape(*x))} == {("w",)}
    with pytest.raises(JpruneError, match=f"found only w; w is used at .*, but .*{reason}"):
        matmuls(f, params, shape(*x), where="w")


def test_what_is_not_followed_is_refused_for_what_it_is():
    """Kernels in a shard_map, in a kernel of their own, and a matrix that is stored as its nonzero numbers."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(p, x):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec(), spec()), out_specs=spec())(x, p["w"])

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def pallas(p, x):
        out = jax.ShapeDtypeStruct((3, 4), jnp.float32)
        return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, p["w"])

    def sparse(p, x):
        indices = jnp.array([[0, 1], [2, 3]])
        return BCOO((p["w"][0, :2], indices), shape=(4, 4)) @ x.T

    for f, name in ((sharded, "shard_map"), (pallas, "pallas_call"), (sparse, "bcoo_dot_general")):
        (left,) = skipped(f, {"w": shape(4, 4)}, shape(3, 4))
        assert left.paths == ("w",)
        assert f"{name} reads it, which is not followed" in left.reason


def test_the_condition_of_a_loop_is_refused():
    def f(p, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x @ p["w"]) < 9, lambda x: 2 * x, x)

    (left,) = skipped(f, {"w": shape(4, 4)}, shape(3, 4))
    assert left.reason == "it lies in the condition of a loop"


def test_control_flow_without_a_parameters_matmul_is_an_equation():
    def f(p, x):
        state, _ = jax.lax.scan(lambda s, x: (s * p["decay"] + x, None), jnp.zeros(x.shape[1:]), x)
        spectral = jax.lax.fori_loop(0, 3, lambda i, v: p["v"] @ v, jnp.ones(4))  # of parameters alone
        return (state + x) @ p["w"] / jnp.sum(spectral)

    params = {"decay": shape(4), "w": shape(4, 4), "v": shape(4, 4)}
    assert table(matmuls(f, params, shape(3, 4))) == [("w", (0,), (1,), 0, 0)]
    assert skipped(f, params, shape(3, 4)) == ()


def test_where_that_finds_nothing_lists_near_misses():
    with pytest.raises(JpruneError, match=r"'attn/query' matches none .*attn/q"):
        matmuls(lambda p, x: x @ p["attn"]["q"], {"attn": {"q": shape(4, 4)}}, shape(2, 4), where="attn/query")


def test_paths_of_linen_and_nnx():
    linen = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    params = jax.eval_shape(linen.init, jax.random.key(0), shape(1, 4))
    found = matmuls(linen.apply, params, shape(1, 4))
    assert [m.path for m in found] == ["params/layers_0/kernel", "params/layers_2/kernel"]

    module = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(module)
    found = matmuls(lambda s, x: nnx.merge(graph, s)(x), state, shape(1, 4), where="kernel$")
    assert [m.path for m in found] == ["layers/0/kernel"]


def test_constants_are_not_parameters():
    table = jnp.asarray(np.eye(4, dtype=np.float32))
    f = lambda p, x: (x @ table) @ (table @ p["w"])  # noqa: E731
    assert matmuls(f, {"w": shape(4, 4)}, shape(2, 4)) == ()
    assert "made by dot_general" in skipped(f, {"w": shape(4, 4)}, shape(2, 4))[0].reason
    # Where nothing at all depends on an argument, what is closed over takes the arguments' place.
    assert [m.path for m in matmuls(lambda p: table @ p["w"], {"w": shape(4, 4)})] == ["w"]
    assert [m.path for m in matmuls(lambda p: (table @ p["w"], 2 * table), {"w": shape(4, 4)})] == ["w"]
    (left,) = skipped(lambda p, x: x + table @ p["w"], {"w": shape(4, 4)}, shape(4, 4))
    assert left.reason == "what it is multiplied with depends on no argument; hand that in as one"
