"""Experts compute what they are sent: three ways of adding up, against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune import devices
from jprune.models import decoder, experts, families
from jprune.models.modules import _expert
from jprune.models.routing import Routes
from jprune.statistics import SquaredNorm
from jprune.trace import matmuls, observe

COUNT, D, F = 5, 8, 6
EXPERT = _expert("silu")


def made(rng, n, k, *, only=None, dtype=np.float32):
    """Kernels, tokens, and routes to k experts each, of those in `only`."""
    kernels = {name: rng.normal(size=(COUNT, *shape)) for name, shape in SHAPES.items()}
    order = np.array([rng.permutation(COUNT if only is None else only)[:k] for _ in range(n)], np.int32)
    routes = Routes(jnp.asarray(order.reshape(n, k)), jnp.asarray(rng.uniform(0.1, 1, (n, k)), jnp.float32))
    return (
        {name: jnp.asarray(v, dtype) for name, v in kernels.items()},
        jnp.asarray(rng.normal(size=(n, D)), dtype),
        routes,
    )


SHAPES = {"gate": (D, F), "up": (D, F), "down": (F, D)}


def by_hand(kernels, x, routes):
    """In float64, token by token and expert by expert."""
    gate, up, down = (np.asarray(kernels[name], np.float64) for name in ("gate", "up", "down"))
    x, y = np.asarray(x, np.float64), np.zeros(x.shape)
    for t in range(len(x)):
        for e, weight in zip(np.asarray(routes.experts)[t], np.asarray(routes.weights, np.float64)[t]):
            a = x[t] @ gate[e]
            y[t] += weight * ((a / (1 + np.exp(-a)) * (x[t] @ up[e])) @ down[e])
    return y


def mixed(kernels, x, routes):
    """What a block does."""
    return experts.mix(EXPERT, kernels, x[:, None], Routes(*(part[:, None] for part in routes)), COUNT)[:, 0]


def dense(kernels, x, routes):
    batch = Routes(*(part[None] for part in routes))
    return experts.dense(EXPERT, kernels, x[None], batch, COUNT)[0]


def ragged(kernels, x, routes):
    return experts.ragged(EXPERT, kernels, x, routes, COUNT)[0]


def test_what_is_watched_can_be_trained_through(rng):
    """Norms come beside the gradient, which they do not change."""
    kernels, x, routes = made(rng, 20, 2)

    def loss(kernels):
        with experts.watched() as seen:
            y = mixed(kernels, x, routes)
        return jnp.sum(y**2), seen[0].norms

    gradient, norms = jax.jit(jax.grad(loss, has_aux=True))(kernels)
    truth = jax.jit(jax.grad(lambda kernels: jnp.sum(mixed(kernels, x, routes) ** 2)))(kernels)
    jax.tree.map(np.testing.assert_array_equal, gradient, truth)
    for j in range(2):
        alone = Routes(routes.experts[:, j : j + 1], jnp.ones((20, 1)))
        np.testing.assert_allclose(norms[:, 0, j], np.linalg.norm(by_hand(kernels, x, alone), axis=1), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize(("k", "only"), [(2, None), (1, [3]), (2, [0, 4]), (5, None)], ids=str)
@pytest.mark.parametrize("way", [dense, ragged, mixed])
def test_every_way_adds_up_the_same(way, n, k, only, rng):
    """One token and many, experts that get none, all tokens for one, and every expert for each."""
    given = made(rng, n, k, only=only)
    np.testing.assert_allclose(jax.jit(way)(*given), by_hand(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [dense, ragged, mixed])
def test_biases_and_a_clamped_swiglu(way, rng, monkeypatch):
    """As in gpt-oss: a loop over tokens and experts; gradients as those of the dense way."""
    monkeypatch.setitem(globals(), "EXPERT", _expert("silu", (1.7, 0.8)))
    kernels, x, routes = made(rng, 30, 2, only=[0, 1, 4])
    for name, (_, width) in SHAPES.items():
        kernels[f"{name} bias"] = jnp.asarray(rng.normal(size=(COUNT, width)), jnp.float32)
    want = np.zeros(x.shape)
    for t in range(len(x)):
        for e, weight in zip(np.asarray(routes.experts)[t], np.asarray(routes.weights)[t]):
            gate, up = (np.asarray(x[t] @ kernels[name][e] + kernels[f"{name} bias"][e]) for name in ("gate", "up"))
            gate, up = np.minimum(gate, 0.8), np.clip(up, -0.8, 0.8)
            hidden = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            want[t] += weight * np.asarray(hidden @ kernels["down"][e] + kernels["down bias"][e])
    np.testing.assert_allclose(jax.jit(way)(kernels, x, routes), want, rtol=1e-5, atol=1e-5)
    truth, found = (jax.jit(jax.grad(lambda k, f=f: jnp.sum(f(k, x, routes) ** 2)))(kernels) for f in (dense, way))
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * float(jnp.abs(value).max()))


def test_what_is_observed_of_an_expert_with_biases_is_what_it_was_sent(rng):
    """Tokens that it was not sent are zeros in front of its last kernel too, whatever its biases are."""
    sizes = {"vocab_size": 9, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": COUNT, "num_experts_per_tok": 1}
    config = families.config({"model_type": "gpt_oss"} | sizes | heads)
    params = decoder.init_params(config, jax.random.key(0))["blocks"]["0"]
    params["mlp"]["router"]["bias"] = jnp.asarray([0.0, 9, 0, 0, 0])  # all tokens go to one
    for name in ("gate", "up"):
        params["mlp"]["experts"][name]["bias"] = jnp.ones((COUNT, F))
    x = jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32)
    _, seen = observe(decoder.block(config, 0), SquaredNorm)(params, x)
    each = seen["mlp/experts/down/kernel"].each
    np.testing.assert_array_equal(each.tokens, [0, 3, 0, 0, 0])
    np.testing.assert_array_equal((each.total > 0).any(axis=-1), [False, True, False, False, False])


def test_sums_of_half_precision_are_rounded_once(rng):
    given = made(rng, 40, 5, dtype=jnp.bfloat16)
    expected = np.stack([by_hand(jax.tree.map(np.float32, given[0]), *given[1:])])[0]
    y = jax.jit(mixed)(*given)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), expected, rtol=0.05, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("way", "n"), [(mixed, 1), (mixed, 60), (ragged, 60)])
def test_gradients_are_those_of_the_dense_way(way, n, rng):
    """Of kernels, tokens and weights, and of several examples at once, each with routes of its own."""
    kernels, x, routes = made(rng, n, 2, only=[0, 1, 4])
    dy = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def pulled(way, x, number):
        def loss(kernels, x, weights):
            return jnp.sum(way(kernels, x, Routes(number, weights)) * dy)

        return jax.grad(loss, argnums=(0, 1, 2))(kernels, x, routes.weights)

    def each(way, many):
        return jax.jit(many(functools.partial(pulled, way)))(xs, numbers)

    def in_turn(f):  # JAX has no vmap of ragged products
        return lambda *operands: jax.lax.map(lambda given: f(*given), operands)

    xs, numbers = jnp.stack([x, 2 * x]), jnp.stack([routes.experts, (routes.experts + 1) % COUNT])
    truth, found = each(dense, jax.vmap), each(way, jax.vmap if way is mixed else in_turn)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_kernels_of_experts_that_are_sent_nothing_are_not_read(rng):
    """They may be anything."""
    kernels, x, routes = made(rng, 9, 2, only=[1, 3])
    damaged = {name: value.at[jnp.array([0, 2, 4])].set(jnp.nan) for name, value in kernels.items()}
    np.testing.assert_array_equal(jax.jit(mixed)(damaged, x, routes), jax.jit(mixed)(kernels, x, routes))


def test_devices_compute_their_own_tokens(four_devices, rng):
    """And gather none of others': sums and gradients as on one device."""
    kernels, x, routes = made(rng, 24, 2)
    mesh = devices.make_mesh()

    def step(kernels, x, routes):
        return jax.value_and_grad(lambda kernels: jnp.sum(mixed(kernels, x, routes) ** 2))(kernels)

    truth = jax.jit(step)(kernels, x, routes)
    shared = devices.spread((x, routes), mesh)
    compiled = jax.jit(devices.within(mesh, step)).lower(kernels, *shared).compile()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), compiled(kernels, *shared), truth)
    assert "all-gather" not in compiled.as_text()


def test_a_block_is_read_as_dense_and_run_as_routed(rng):
    """Run before it is read and after: what JAX remembers of one is not taken for the other."""
    config = families.config(
        {"model_type": "mixtral", "vocab_size": 9, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": COUNT}
    )
    block, params = decoder.block(config, 0), decoder.init_params(config, jax.random.key(0))["blocks"]["0"]
    x = jnp.asarray(rng.normal(size=(1, 3, D)), jnp.float32)
    again = jax.checkpoint(block)
    before = str(jax.make_jaxpr(again)(params, x))
    assert "while" in before
    found = {m.path: m for m in matmuls(again, params, x)}
    assert found["mlp/experts/down/kernel"].batch_axes == (0,)
    assert str(jax.make_jaxpr(again)(params, x)) == before
