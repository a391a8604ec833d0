"""Segments composed are the function; each matmul runs once; kernels may change before they are used."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core as jex

from jprune.errors import JpruneError
from jprune.statistics import SquaredNorm
from jprune.trace import matmuls, stages
from jprune.trace.jaxpr import flat_body, trace


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def run(staged, params, *args):
    carry = staged.start(*args)
    for segment in staged.segments:
        carry = segment(params, carry)
    return staged.finish(carry)


def count(f, *args):
    """How many matmuls f runs, loops once."""

    def within(closed):
        body = flat_body(closed)
        return sum(
            (e.primitive.name == "dot_general") + sum(map(within, jex.jaxprs_in_params(e.params)))
            for e in body.equations
        )

    return within(jax.make_jaxpr(f)(*args))


def carried(staged):
    """Shapes and dtypes of the carry between segments."""
    return [[x.aval.str_short() for x in carry] for carry in staged.carries[1:-1]]


def test_order(architecture):
    staged = stages(architecture.f, architecture.params, architecture.x)
    assert [sorted(m.path for m in stage) for stage in staged.matmuls] == list(map(sorted, architecture.stages))
    assert all(m.stage == s for s, stage in enumerate(staged.matmuls) for m in stage)
    assert len(staged.segments) == len(architecture.stages) + 1


def test_composed_is_f_bit_for_bit(architecture):
    a = architecture
    abstract = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), (a.params, a.x))
    staged = stages(a.f, *abstract)
    with jax.disable_jit():  # fused by XLA, the segments round as they are fused
        np.testing.assert_array_equal(run(staged, a.params, a.x), a.f(a.params, a.x))
    staged = dataclasses.replace(staged, segments=tuple(map(jax.jit, staged.segments)))
    tolerance = 2e-2 if "params" in a.params else 1e-5
    np.testing.assert_allclose(run(staged, a.params, a.x), a.f(a.params, a.x), atol=tolerance)


def test_each_matmul_runs_once(architecture):
    a = architecture
    staged = stages(a.f, a.params, a.x)
    carry, counts = staged.start(a.x), []
    for segment in staged.segments:
        counts.append(count(segment, a.params, carry))
        carry = jax.eval_shape(segment, a.params, carry)
    assert sum(counts) == count(a.f, a.params, a.x)
    assert counts[0] == 0
    assert all(n >= len(stage) for n, stage in zip(counts[1:], staged.matmuls))


def test_inputs_are_those_of_a_forward_hook(architecture):
    a = architecture
    staged = stages(a.f, a.params, a.x)
    expected = a.hook(a.params, a.x)
    carry = staged.start(a.x)
    for s, stage in enumerate(staged.matmuls):
        carry = staged.segments[s](a.params, carry)
        inputs = staged.inputs(s, carry)
        assert set(inputs) == {m.input_id for m in stage}
        for m in stage:
            x = np.asarray(inputs[m.input_id], np.float32)
            tolerance = 2e-2 if "params" in a.params else 1e-5
            want = np.asarray(expected[m.path], np.float32).reshape(x.shape)
            np.testing.assert_allclose(x, want, atol=tolerance, err_msg=m.path)


def test_carry_is_the_residual_and_the_input(architecture):
    a = architecture
    staged = stages(a.f, a.params, a.x)
    # The parallel block carries x, and what both o and down read.
    assert [len(c) for c in carried(staged)] == ([2, 3] if len(staged.matmuls) == 2 else [2, 2, 2, 2])


def prune(kernel, x):
    """A stand-in for a method: zeroes the inputs with the smaller norms."""
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=0)
    return jnp.where((norms >= jnp.median(norms)).reshape(-1, *[1] * (kernel.ndim - 1)), kernel, 0)


def test_pruned_in_between_equals_a_sequential_run_by_hand(rng):
    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def f(p, x):
        h = norm(x)
        scores = jax.nn.softmax(jnp.einsum("td,sd->ts", h @ p["q"], h @ p["k"]))
        x = x + (scores @ (h @ p["v"])) @ p["o"]
        h = norm(x)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    names = ["q", "k", "v", "o", "gate", "up"]
    p = {n: jnp.asarray(rng.normal(size=(6, 6)), jnp.float32) for n in [*names, "down"]}
    x0 = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)

    staged = stages(f, p, x0)
    params, carry = dict(p), staged.start(x0)
    for s, segment in enumerate(staged.segments):
        carry = segment(params, carry)
        if s < len(staged.matmuls):
            inputs = staged.inputs(s, carry)
            params |= {m.path: prune(params[m.path], inputs[m.input_id]) for m in staged.matmuls[s]}

    h = norm(x0)
    q, k, v = (h @ prune(p[n], h) for n in "qkv")
    mixed = jax.nn.softmax(q @ k.T) @ v
    x = x0 + mixed @ prune(p["o"], mixed)
    h = norm(x)
    inner = jax.nn.silu(h @ prune(p["gate"], h)) * (h @ prune(p["up"], h))
    expected = x + inner @ prune(p["down"], inner)
    np.testing.assert_allclose(staged.finish(carry), expected, atol=1e-5)
    np.testing.assert_allclose(params["down"], prune(p["down"], inner))


def test_values_made_of_parameters_alone_are_not_carried():
    def f(p, x):
        w = jnp.tanh(p["scale"]) * 2
        mask = jnp.tril(jnp.ones((3, 3)))
        x = (mask @ (x * w)) @ p["a"]
        return ((mask @ x) * w) @ p["b"], p["a"].T, 3.0

    args = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "scale": jnp.ones(4)}, jnp.ones((3, 4))
    staged = stages(f, *args)
    assert carried(staged) == [["float32[3,4]"], ["float32[3,4]"]]
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, run(staged, *args), f(*args))


def test_what_is_cheap_is_repeated_rather_than_carried():
    """Cosines and sines travel as the integers they come from; a bfloat16 residual not as its float32 cast."""

    def f(p, x, positions):
        angles = positions[:, None].astype(jnp.float32) * jnp.arange(4.0)
        x = jnp.cos(angles) * (x.astype(jnp.float32) @ p["a"])
        h = x.astype(jnp.bfloat16)
        y = jnp.sin(angles) * (x @ p["b"]) @ p["c"]
        return y + h.astype(jnp.float32) + h.astype(jnp.float32).T.reshape(h.shape)

    params = {n: shape(4, 4) for n in "abc"}
    staged = stages(f, params, shape(4, 4, dtype=jnp.bfloat16), shape(4, dtype=jnp.int32))
    first, second, third = carried(staged)
    assert sorted(first) == ["float32[4,4]", "int32[4]"]
    assert sorted(second) == ["float32[4,4]", "int32[4]"]
    assert sorted(third) == ["bfloat16[4,4]", "float32[4,4]"]


def test_a_kernel_with_another_use_is_in_no_stage():
    """x + w would have another value once w is pruned, and its later use would not be that of f."""

    def f(p, x):
        h = x + p["w"]
        return (h @ p["w"]) * h @ p["v"]

    with pytest.warns(UserWarning, match=r"50 % of the parameters are left out; the largest is w: .* \(add\) at"):
        staged = stages(f, {"w": shape(4, 4), "v": shape(4, 4)}, shape(4, 4))
    assert [[m.path for m in stage] for stage in staged.matmuls] == [["v"]]


def test_a_kernel_of_two_stages_is_refused():
    """As in ALBERT, whose layers share their kernels: pruned in each stage, it would be pruned twice."""

    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    args = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    with pytest.raises(JpruneError, match="found w in stages 0 and 1"):
        stages(f, *args)
    np.testing.assert_array_equal(run(stages(f, *args, shared=True), *args), f(*args))


def test_where_makes_other_matmuls_equations(architecture):
    a = architecture
    staged = stages(a.f, a.params, a.x, where=lambda path: "down" in path or "up" in path)
    up, down = ([m.path for m in stage] for stage in staged.matmuls)
    assert all("up" in path for path in up)
    assert all("down" in path for path in down)
    with jax.disable_jit():
        np.testing.assert_array_equal(run(staged, a.params, a.x), a.f(a.params, a.x))


def test_no_matmuls_make_one_segment():
    staged = stages(lambda p, x: x * p["scale"], {"scale": jnp.ones(3)}, jnp.arange(3.0))
    assert (staged.matmuls, len(staged.segments)) == ((), 1)
    np.testing.assert_array_equal(run(staged, {"scale": jnp.full(3, 2.0)}, jnp.arange(3.0)), [0.0, 2.0, 4.0])


def test_what_kernels_read_may_depend_on_no_argument():
    """An index written down, and inputs that are closed over."""
    index, x0 = jnp.array([2, 0, 1]), jnp.arange(12.0).reshape(3, 4)

    def f(p, x):
        return jnp.tanh(jnp.einsum("td,tdf->tf", x, p["experts"][index])) @ p["w"]

    p = {"experts": jnp.arange(48.0).reshape(3, 4, 4) / 50, "w": jnp.eye(4)}
    staged = stages(f, p, x0)
    carry = staged.segments[0](p, staged.start(x0))
    observed = staged.observe(0, SquaredNorm, carry)
    np.testing.assert_allclose(observed["experts"].of(2).total, x0[0] ** 2)
    np.testing.assert_allclose(staged.inputs(0, carry)[0].sum(1), x0[jnp.array([1, 2, 0])])
    np.testing.assert_allclose(run(staged, p, x0), f(p, x0), rtol=1e-6)
    closed = stages(lambda p: jnp.tanh(x0 @ p["w"]) @ p["v"], {"w": jnp.eye(4), "v": jnp.ones((4, 2))})
    carry = closed.segments[0]({"w": jnp.eye(4), "v": jnp.ones((4, 2))}, closed.start())
    np.testing.assert_allclose(closed.observe(0, SquaredNorm, carry)["w"].total, jnp.sum(x0**2, axis=0))


def test_arguments_that_are_not_needed_are_not_carried_and_outputs_may_be_anything():
    def f(p, x, unused, nothing, pair):
        del unused
        return {"y": x @ p["w"], "x": x, "pair": pair[::-1], "twice": (x, nothing)}

    args = {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)), jnp.ones(5), None, (jnp.zeros(1), jnp.ones(2))
    staged = stages(f, *args)
    assert [c.shape for c in staged.start(*args[1:])] == [(1, 2), (1,), (2,)]
    jax.tree.map(np.testing.assert_array_equal, run(staged, *args), f(*args))


def test_effects_happen_once(capfd):
    def f(p, x):
        h = x @ p["w"]
        jax.debug.print("h = {}", h[0, 0])
        return h @ p["w"]

    args = {"w": jnp.eye(2)}, jnp.ones((1, 2))
    staged = stages(f, *args, shared=True)
    run(staged, *args)
    jax.effects_barrier()
    assert capfd.readouterr().out == "h = 1.0\n"


def test_control_flow_of_values_is_an_equation(rng):
    def f(p, x):
        state, _ = jax.lax.scan(lambda s, x: (s * p["decay"] + x, None), jnp.zeros(4), x @ p["a"])
        return jax.lax.cond(state[0] > 0, jnp.sin, jnp.cos, state) @ p["b"]

    p = {n: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for n in "ab"} | {"decay": jnp.full(4, 0.5)}
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    np.testing.assert_allclose(run(stages(f, p, x), p, x), f(p, x), rtol=1e-6)


def test_a_scan_over_layers_is_written_out_or_refused(rng):
    def f(p, x):
        def layer(x, w):
            h = jnp.tanh(x @ w["up"])
            return x + h @ w["down"], jnp.sum(h)

        return jax.lax.scan(layer, x, p, reverse=True)

    shapes = {"up": (3, 4, 6), "down": (3, 6, 4)}
    p = {n: jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    with pytest.raises(JpruneError, match=r"found up used inside a loop.*`unroll=True`"):
        stages(f, p, x)
    staged = stages(f, p, x, unroll=True)
    parts = [(m.path, m.part[0]) for stage in staged.matmuls for m in stage]
    assert parts == [(n, (i, i + 1)) for i in (2, 1, 0) for n in ("up", "down")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(staged, p, x), f(p, x))


def test_sharded_and_donated():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def f(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    p = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4))}
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.sharding.NamedSharding(mesh, spec("data")))
    expected = np.asarray(f(p, x))
    staged = stages(f, p, x)
    carry = staged.start(x)
    for segment in staged.segments:
        carry = jax.jit(segment, donate_argnums=1)(p, carry)
        assert all(c.sharding.spec[0] == "data" for c in carry)
    np.testing.assert_array_equal(staged.finish(carry), expected)

    local = stages(f, p, shape(2, 4))
    per_device = jax.shard_map(
        lambda p, x: run(local, p, x),
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec("data"),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(per_device)(p, jnp.arange(32.0).reshape(8, 4)), expected)


@pytest.mark.parametrize(
    ("params", "x", "message"),
    [
        ({"w": np.ones((4, 5), np.float32)}, np.ones((2, 4), np.float32), r"params\['w'\] to be float32\[4,4\]"),
        ({"v": np.ones((4, 4), np.float32)}, np.ones((2, 4), np.float32), "expected params with the tree"),
        ({"w": np.ones((4, 4), np.float32)}, np.ones((3, 4), np.float32), r"arguments\[0\] to be float32\[2,4\]"),
        ({"w": np.ones((4, 4), np.float16)}, np.ones((2, 4), np.float32), r"got float16\[4,4\]; call it again"),
    ],
)
def test_other_shapes_than_traced_are_refused(params, x, message):
    staged = stages(lambda p, x: x @ p["w"], {"w": shape(4, 4)}, shape(2, 4))
    with pytest.raises(JpruneError, match=message):
        run(staged, params, x)


OPERATIONS = {
    "matmul": lambda w, x, y: x @ w,
    "transposed": lambda w, x, y: x @ w.T,
    "heads": lambda w, x, y: jnp.einsum("tnk,nkd->td", x.reshape(-1, 2, 2), w.reshape(2, 2, 4)),
    "half": lambda w, x, y: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32),
    "jit": lambda w, x, y: jax.jit(lambda x: jax.nn.silu(x @ w))(x),
    "remat": lambda w, x, y: jax.remat(lambda x: jax.nn.relu(x) @ w)(x),
    "add": lambda w, x, y: x + y,
    "mul": lambda w, x, y: x * y,
    "scale": lambda w, x, y: x * w[0],
    "norm": lambda w, x, y: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3),
    "mix": lambda w, x, y: jax.nn.softmax(x @ y.T) @ y,
    "cast": lambda w, x, y: x.astype(jnp.bfloat16).astype(jnp.float32),
    "view": lambda w, x, y: x.reshape(2, 6).T.reshape(3, 4),
}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 3), st.integers(), st.integers()), min_size=1
    ),
    st.sampled_from([None, lambda path: path in ("0", "2")]),
)
def test_any_network_composed_is_itself(network, where):
    def f(p, x):
        values = [x]
        for name, w, i, j in network:
            values.append(OPERATIONS[name](p[str(w)], values[i % len(values)], values[j % len(values)]))
        return values[-1], values[len(values) // 2]

    rng = np.random.default_rng(0)
    p = {str(i): jnp.asarray(rng.normal(size=(4, 4)) / 2, jnp.float32) for i in range(4)}
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    with jax.disable_jit():
        expected = f(p, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels with other uses
        staged = stages(f, p, x, where=where, shared=True)
    carry, dots = staged.start(x), 0
    for s, segment in enumerate(staged.segments):
        dots += count(segment, p, carry)
        carry = segment(p, carry)
        if s < len(staged.matmuls):
            assert {m.input_id for m in staged.matmuls[s]} == staged.inputs(s, carry).keys()
            assert all(x.size == 12 for x in staged.inputs(s, carry).values())
    jax.tree.map(np.testing.assert_array_equal, staged.finish(carry), expected)
    assert sum(map(len, staged.matmuls)) == len(matmuls(f, p, x, where=where))
    assert dots == sum(e.primitive.name == "dot_general" for e in trace(f, p, x).equations)
