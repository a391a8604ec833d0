"""LoRA against dense algebra: adapted == merged, gradients by the chain rule, and what PEFT's formula gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from jprune import trees
from jprune.errors import JpruneError
from jprune.trace import matmuls
from jprune.train import lora


def network(p, x):
    """Matmuls in many layouts: heads, transposed kernels, a kernel on the left, reshaped and reused ones."""
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    y = jnp.einsum("bthk,hkd->btd", jnp.tanh(q), p["o"])
    y = y @ p["reshaped"].reshape(6, 6) + jnp.einsum("ed,btd->bte", p["turned"], y)
    z = jnp.einsum("oi,ib->ob", p["left"], y.reshape(-1, 6).T)
    return jax.nn.relu(y) @ p["twice"], jnp.sin(z) @ p["last"], x @ p["twice"]


SHAPES = {
    "q": (6, 2, 4), "o": (2, 4, 6), "reshaped": (2, 3, 6), "turned": (6, 6), "left": (5, 6), "twice": (6, 6),
    "last": (6, 3),
}  # fmt: skip


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (2, 3, 6))


def axes_of(params, x):
    return {m.path: m.in_axes for m in matmuls(network, params, x)}


def trained(params, x, getkey, **options):
    """Adapters with random B, as after some training."""
    adapters = lora.init(params, axes_of(params, x), rank=2, key=getkey(), **options)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), adapters)


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


def test_starts_as_the_function_itself(params, x, getkey):
    adapters = lora.init(params, axes_of(params, x), rank=3, key=getkey())
    got = jax.jit(lora.adapt(network, alpha=16))(params, adapters, None, x)
    close(got, jax.jit(network)(params, x), rtol=1e-6)
    flat = trees.flatten(adapters)
    assert flat["q/a"].shape == (6, 3)
    assert flat["q/b"].shape == (3, 2, 4)
    assert flat["o/a"].shape == (2, 4, 3)
    assert flat["turned/a"].shape == (6, 3)
    a = np.asarray(lora.init({"w": jnp.zeros((100, 50))}, {"w": (0,)}, rank=64, key=getkey())["w"]["a"])
    assert 0.095 < abs(a).max() <= 0.1  # U(-1/sqrt(d_in), 1/sqrt(d_in))
    np.testing.assert_allclose(a.std(), 0.1 / np.sqrt(3), rtol=0.03)


def test_adapted_is_merged(params, x, getkey):
    adapters = trained(params, x, getkey)
    assert {path for path in lora.by_path(adapters)} == set(SHAPES)
    merged = lora.merge(params, adapters, alpha=5.0, in_axes=axes_of(params, x))
    got = jax.jit(lora.adapt(network, alpha=5.0))(params, adapters, None, x)
    close(got, jax.jit(network)(merged, x), rtol=1e-4, atol=1e-4)
    w = params["turned"] + 2.5 * np.einsum("ir,ro->oi", adapters["turned"]["a"], adapters["turned"]["b"])
    np.testing.assert_allclose(merged["turned"], w, rtol=1e-5)


def test_gradients_are_those_of_the_merged_kernels(params, x, getkey):
    adapters, axes = trained(params, x, getkey), axes_of(params, x)

    def total(outputs):
        return sum(jnp.sum(jnp.cos(y)) for y in outputs)

    got = jax.jit(jax.grad(lambda ad: total(lora.adapt(network, alpha=5.0)(params, ad, None, x))))(adapters)
    want = jax.jit(jax.grad(lambda ad: total(network(lora.merge(params, ad, alpha=5.0, in_axes=axes), x))))(adapters)
    close(got, want, rtol=1e-3, atol=1e-3)


def test_no_gradient_and_no_product_of_kernel_size(getkey):
    """Nothing as large as the kernel is computed, forward or backward, but the kernel's own casts: counted."""
    params, x = {"w": jnp.ones((40, 50))}, jnp.ones((3, 40))
    adapters = lora.init(params, {"w": (0,)}, rank=2, key=getkey())

    def loss(adapters, params, x):
        return jnp.sum(lora.adapt(lambda p, x: x @ p["w"], alpha=1.0)(params, adapters, None, x) ** 2)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jex.jaxprs_in_params(equation.params):
                yield from sizes(getattr(inner, "jaxpr", inner))
            yield from (v.aval.size for v in equation.outvars)

    closed = jax.make_jaxpr(jax.grad(loss))(adapters, params, x)
    assert max(sizes(closed.jaxpr)) < 40 * 50


def test_targets(params, x, getkey):
    adapters = lora.init(params, axes_of(params, x), rank=2, key=getkey(), targets=["^q$", "left"])
    assert set(adapters) == {"q", "left"}
    same = lora.init(params, axes_of(params, x), rank=2, key=jax.random.key(3), targets="^q$")["q"]["a"]
    other = lora.init(params, axes_of(params, x), rank=2, key=jax.random.key(3))["q"]["a"]
    np.testing.assert_array_equal(same, other)
    with pytest.raises(JpruneError, match="'nothing' matches none of the 7 kernels"):
        lora.init(params, axes_of(params, x), rank=2, key=getkey(), targets="nothing")
    with pytest.raises(JpruneError, match="rank of adapters must be at least 1"):
        lora.init(params, axes_of(params, x), rank=0, key=getkey())
    with pytest.raises(JpruneError, match="adapter for 'nowhere', but no matmul"):
        lora.adapt(network, alpha=1)(params | {"nowhere": jnp.ones((2, 2))}, {"nowhere": adapters["q"]}, None, x)
    with pytest.raises(JpruneError, match=r"q: expected adapters a \(6,\) x r and b r x \(2, 4\)"):
        lora.adapt(network, alpha=1)(params, {"q": adapters["left"]}, None, x)


def test_dropout(getkey):
    """The kernel sees everything, the adapter a rescaled part: the mean is right and the rate too."""
    params, x = {"w": jnp.zeros((500, 2)), "v": jnp.zeros((500, 2))}, jnp.ones((40, 500))
    one = {"a": jnp.ones((500, 1)), "b": jnp.ones((1, 2))}
    f = lora.adapt(lambda p, x: (x @ p["w"], x @ p["v"]), alpha=1.0, dropout=0.1)
    whole, _ = f(params, {"w": one, "v": one}, None, x)
    np.testing.assert_array_equal(whole, 500)
    dropped, again = f(params, {"w": one, "v": one}, getkey(), x)
    np.testing.assert_array_equal(dropped, again)  # what reads the same value shares its dropout
    rate = 26 / 256  # 0.1, rounded
    kept = np.asarray(dropped[:, 0]) * (1 - rate)
    assert len(set(kept)) > 5
    np.testing.assert_allclose(kept.mean(), 500 * (1 - rate), rtol=0.01)
    np.testing.assert_allclose(kept.std(), np.sqrt(500 * rate * (1 - rate)), rtol=0.35)
    assert (np.asarray(f(params, {"w": one, "v": one}, getkey(), x)[0]) != np.asarray(dropped)).any()
    with pytest.raises(JpruneError, match=r"probability is in \[0, 1\), got 1"):
        lora.adapt(network, alpha=1.0, dropout=1.0)


def test_merge_keeps_zeros_and_dtypes(getkey):
    w = jnp.where(jax.random.bernoulli(getkey(), 0.5, (6, 4)), 1.5, 0.0).astype(jnp.bfloat16)
    adapters = {"w": {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 4))}}
    merged = lora.merge({"w": w, "norm": jnp.ones(3)}, adapters, alpha=1.0, masks={"w": w != 0})
    assert merged["w"].dtype == jnp.bfloat16
    with pytest.raises(JpruneError, match="w: expected a kernel in floating point, got int8"):
        lora.merge({"w": w.astype(jnp.int8)}, adapters, alpha=1.0)
    np.testing.assert_array_equal(merged["w"], jnp.where(w != 0, 2.5, 0).astype(jnp.bfloat16))
    np.testing.assert_array_equal(merged["norm"], 1)
    with pytest.raises(JpruneError, match=r"w: the adapter's product is \(6, 4\), the kernel \(4, 6\)"):
        lora.merge({"w": w.T}, adapters, alpha=1.0)


def test_bfloat16_base(getkey, x):
    """The base computes in bfloat16, the adapters in float32, the result is bfloat16."""
    params = {"w": jax.random.normal(getkey(), (6, 5), jnp.bfloat16)}
    adapters = {"w": {"a": jax.random.normal(getkey(), (6, 2)), "b": jax.random.normal(getkey(), (2, 5))}}
    x = x.astype(jnp.bfloat16)
    got = lora.adapt(lambda p, x: x @ p["w"], alpha=2.0)(params, adapters, None, x)
    assert got.dtype == jnp.bfloat16
    wide = x.astype(jnp.float32)
    want = wide @ params["w"].astype(jnp.float32) + wide @ adapters["w"]["a"] @ adapters["w"]["b"]
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0.02, atol=0.05)


def deep(p, x):
    """A scan along layers on axis 1 of one kernel and axis 0 of the other, with a kernel that all of them share."""

    def layer(x, each):
        up, down = each
        return x + jnp.tanh(x @ up) @ down + x @ p["shared"], jnp.sum(x)

    x, sums = jax.lax.scan(layer, x, (p["up"].swapaxes(0, 1), p["down"]), reverse=True)
    return x @ p["head"], sums


def test_layers_of_a_scan(getkey):
    rng = np.random.default_rng(0)
    shapes = {"up": (4, 3, 5), "down": (3, 5, 4), "shared": (4, 4), "head": (4, 2)}
    params = {name: jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32) for name, shape in shapes.items()}
    x = jax.random.normal(getkey(), (6, 4))
    kernels = matmuls(deep, params, x)
    adapters = lora.init(params, kernels, rank=2, key=getkey())
    assert adapters["up"]["a"].shape == (3, 4, 2)
    assert adapters["up"]["b"].shape == (3, 2, 5)
    assert float(jnp.abs(adapters["down"]["a"]).max()) <= 5**-0.5  # U(-1/sqrt(d_in), 1/sqrt(d_in)) of one layer
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) / 3, jnp.float32), adapters)
    adapted = lora.adapt(deep, alpha=3.0)

    def merged(adapters):
        """By NumPy's rules, layer by layer."""
        new = {name: params[name] + 1.5 * adapters[name]["a"] @ adapters[name]["b"] for name in ("shared", "head")}
        up, down = (jnp.einsum("ndr,nrk->ndk", adapters[name]["a"], adapters[name]["b"]) for name in ("up", "down"))
        return new | {"up": params["up"] + 1.5 * up.swapaxes(0, 1), "down": params["down"] + 1.5 * down}

    close(lora.merge(params, adapters, alpha=3.0, in_axes=kernels), merged(adapters), rtol=1e-5, atol=1e-6)

    def both(run):
        return jax.jit(jax.value_and_grad(lambda adapters: jnp.sum(jnp.square(run(adapters)[0]))))(adapters)

    close(both(lambda a: adapted(params, a, None, x)), both(lambda a: deep(merged(a), x)), rtol=2e-4, atol=1e-4)
    with pytest.raises(JpruneError, match=r"up: expected adapters a \(3, 4\) x r and b \(3,\) x r x \(5,\) .*stacked"):
        adapted(params, {"up": adapters["down"]}, None, x)


def groups_of_layers(p, x):
    """A scan along groups of layers in a scan along layers, with a kernel that each group has one of."""

    def group(x, each):
        up, first = each
        x = x + x @ first
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, up)[0], None

    return jax.lax.scan(group, x, (p["up"], p["first"]))[0]


def test_a_scan_in_a_scan(getkey):
    rng = np.random.default_rng(1)
    params = {"up": rng.standard_normal((2, 3, 4, 4)), "first": rng.standard_normal((2, 4, 4))}
    params = {name: jnp.asarray(values / 3, jnp.float32) for name, values in params.items()}
    x = jax.random.normal(getkey(), (6, 4))
    kernels = matmuls(groups_of_layers, params, x)
    assert [(k.path, k.batch_axes) for k in kernels] == [("first", (0,)), ("up", (0, 1))]
    adapters = lora.init(params, kernels, rank=2, key=getkey())
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) / 3, jnp.float32), adapters)
    adapted = lora.adapt(groups_of_layers, alpha=3.0)

    def merged(adapters):
        product = {name: jnp.einsum("...dr,...rk->...dk", pair["a"], pair["b"]) for name, pair in adapters.items()}
        return {name: params[name] + 1.5 * product[name].reshape(params[name].shape) for name in params}

    close(lora.merge(params, adapters, alpha=3.0, in_axes=kernels), merged(adapters), rtol=1e-5, atol=1e-6)

    def both(run):
        return jax.jit(jax.value_and_grad(lambda adapters: jnp.sum(jnp.square(run(adapters)))))(adapters)

    close(both(lambda a: adapted(params, a, None, x)), both(lambda a: groups_of_layers(merged(a), x)), rtol=2e-4)


def test_dropout_in_a_scan_differs_by_layer(getkey):
    params = {"w": jnp.zeros((2, 64, 64))}
    kernels = {"w": {"a": jnp.tile(jnp.eye(64), (2, 1, 1)), "b": jnp.tile(jnp.eye(64), (2, 1, 1))}}

    def outputs(p, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]

    run = lora.adapt(outputs, alpha=64.0, dropout=0.5)
    first, second = run(params, kernels, getkey(), jnp.ones((8, 64)))
    assert {float(v) for v in np.unique(np.stack([first, second]))} == {0.0, 2.0}
    assert 0.4 < float(jnp.mean(first == second)) < 0.6


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda p, x: jax.lax.while_loop(jnp.any, lambda y: y @ p["w"][0], x), "inside of a while loop or branch"),
        (lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"][0], lambda x: x, x), "while loop or branch"),
        (lambda p, x: jnp.einsum("ntd,ndk->ntk", jnp.stack([x, x]), p["w"]), "as a stack .other than along a scan"),
        (lambda p, x: jax.lax.scan(lambda x, w: (x @ w[:, :4], x), x, p["w"])[1], "in parts"),
    ],
)
def test_what_is_no_scan_of_whole_kernels_is_refused(f, why):
    d_out = 5 if why == "in parts" else 4
    params, x = {"w": jnp.ones((2, 4, d_out))}, jnp.ones((3, 4))
    adapters = {"w": {"a": jnp.ones((2, 4, 1)), "b": jnp.ones((2, 1, d_out))}}
    with pytest.raises(JpruneError, match=f"there is an adapter for 'w', but .*{why}"):
        lora.adapt(f, alpha=1)(params, adapters, None, x)
