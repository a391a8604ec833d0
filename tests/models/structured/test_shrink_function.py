"""Any function made smaller in one call, against masks, gradients of the whole tree, and the change of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import JpruneError, Target


def network(params, x):
    """Attention over heads [heads, head_dim], and a gated feed-forward layer; reads its sizes from its arrays."""
    x, hidden = inside(params, x)
    return x + hidden @ params["down"]["w"]


def inside(params, x):
    """What is added to, and what `down` reads."""
    q, k, v = (jnp.einsum("td,dhk->htk", x, params["attn"][name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("htk,hsk->hts", q, k), axis=-1)
    x = x + jnp.einsum("hts,hsk,hkd->td", weights, v, params["attn"]["o"])
    return x, jax.nn.silu(x @ params["gate"]["w"]) * (x @ params["up"]["w"] + params["up"]["bias"])


def loss(params, x):
    return jnp.mean(network(params, x) ** 2)


def drawn(rng):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32)

    attn = {name: draw(8, 4, 3) for name in "qkv"} | {"o": draw(4, 3, 8)}
    dense = {"gate": {"w": draw(8, 12)}, "up": {"w": draw(8, 12), "bias": draw(12)}, "down": {"w": draw(12, 8)}}
    return {"attn": attn, **dense}, [(draw(5, 8),) for _ in range(3)]


HEADS, CHANNELS = "attn/k[1]", "down/w[0]"


def test_smaller_is_masked(rng):
    """The smaller network computes what the masked one does, and the units that stay are the most important ones."""
    params, batches = drawn(rng)
    smaller, kept = jprune.shrink_function(
        network, params, batches, Target(units=0.5), loss=loss, where=[r"attn/k\[1\]", "down"], compensate=False
    )
    assert [smaller["attn"][name].shape for name in "qo"] == [(8, 2, 3), (2, 3, 8)]
    assert [smaller["up"]["bias"].shape, smaller["down"]["w"].shape] == [(6,), (6, 8)]
    groups = jprune.coupled_axes(network, params, *batches[0])
    masked = groups.masked({g: np.isin(np.arange(groups[g].size), units) for g, units in kept.items()})
    np.testing.assert_allclose(network(smaller, *batches[0]), masked(params, *batches[0]), rtol=1e-4, atol=1e-5)

    mean = jax.grad(lambda p: sum(loss(p, *b) for b in batches) / 3)(params)
    salience = jax.tree.map(lambda w, g: np.abs(np.asarray(w * g)), params, mean)
    attn, channels = salience["attn"], [salience[name]["w"] for name in ("gate", "up")]
    heads = sum(attn[name].sum((0, 2)) for name in "qkv") + attn["o"].sum((1, 2))
    np.testing.assert_array_equal(kept[HEADS], np.sort(np.argsort(heads)[2:]))
    channels = sum(c.sum(0) for c in channels) + salience["down"]["w"].sum(1)  # a bias does not count
    np.testing.assert_array_equal(kept[CHANNELS], np.sort(np.argsort(channels)[6:]))


def test_devices_share_batches_that_come_one_by_one(rng):
    """A generator is enough; four devices and one keep the same units, which make up for those that go."""
    from jprune import devices

    params, _ = drawn(rng)
    batches = [(jnp.asarray(rng.standard_normal((8, 8)), jnp.float32),) for _ in range(3)]
    options = {"target": Target(units=0.5), "loss": loss, "criterion": "param_mix", "where": ["down"]}
    smaller, one = jprune.shrink_function(network, params, batches, **options)
    taken = []

    def told():
        for batch in batches:
            taken.append(len(taken))
            yield batch

    mesh = devices.make_mesh(devices=jax.devices())
    again, four = jprune.shrink_function(network, params, told(), mesh=mesh, **options)
    assert taken == [0, 1, 2]
    np.testing.assert_array_equal(one[CHANNELS], four[CHANNELS])
    np.testing.assert_allclose(smaller["down"]["w"], again["down"]["w"], atol=1e-4)
    x = np.concatenate([inside(params, *batch)[1] for batch in batches]).astype(np.float64)
    left, w = x[:, one[CHANNELS]], np.asarray(params["down"]["w"], np.float64)
    damping = 0.01 * np.mean(np.sum(left**2, 0))
    inner = left.T @ left + damping * np.eye(6)
    expected = np.linalg.solve(inner, left.T @ x @ w + damping * w[one[CHANNELS]])
    np.testing.assert_allclose(smaller["down"]["w"], expected, atol=1e-4)


def test_weights_alone_and_a_size(rng):
    params, batches = drawn(rng)
    whole = sum(x.size for x in jax.tree.leaves(params))
    smaller, kept = jprune.shrink_function(
        network, params, batches[:1], Target(share=0.2), criterion="l2", where="down", compensate=False
    )
    (units,) = kept.values()
    assert (left := sum(x.size for x in jax.tree.leaves(smaller))) <= 0.8 * whole < left + 3 * 8 + 1
    norms = sum((np.asarray(params[n]["w"]) ** 2).sum(0) for n in ("gate", "up"))
    norms += (np.asarray(params["down"]["w"]) ** 2).sum(1)
    np.testing.assert_array_equal(units, np.sort(np.argsort(norms)[-len(units) :]))


def mixed(params, x):
    """Of b, sizes stand in the code; of d, nothing does."""
    squares = jax.nn.relu((x @ params["a"]).reshape(-1, 3, 3)).reshape(-1, 9)
    return squares @ params["b"] + jax.nn.relu(x @ params["c"]) @ params["d"]


def test_what_is_not_proven(rng):
    params = {name: jnp.asarray(rng.standard_normal((4, 9)[:: 1 if name in "ac" else -1])) for name in "abcd"}
    plain = {"criterion": "l2", "compensate": False}
    half = ([(jnp.ones((2, 4)),)], Target(units=0.3))
    with pytest.raises(JpruneError, match=r"proven to be safe to prune, got a\[1\].0 .*believed: .*; `believed` takes"):
        jprune.shrink_function(mixed, params, *half, **plain, where="a.1")
    with pytest.raises(JpruneError, match=r"got a\[0\] \(4 units\), frozen: axis 1 of an argument of f$"):
        jprune.shrink_function(mixed, params, *half, **plain, where="a.0", believed=True)
    with pytest.warns(UserWarning, match=r"left as they are, .* a\[1\].0, a\[1\].1; `believed` takes them"):
        smaller, _ = jprune.shrink_function(mixed, params, *half, **plain)
    assert [x.shape for x in smaller.values()] == [(4, 9), (9, 4), (4, 6), (6, 4)]
    smaller, kept = jprune.shrink_function(mixed, params, *half, **plain, where="a.1", believed=True)
    rows, columns = kept.values()
    np.testing.assert_array_equal(smaller["b"], params["b"].reshape(3, 3, 4)[rows][:, columns].reshape(4, 4))


def test_refusals(rng):
    params, batches = drawn(rng)
    with pytest.raises(JpruneError, match="at least one batch"):
        jprune.shrink_function(network, params, [], Target(units=0.5), criterion="l2")
    with pytest.raises(JpruneError, match=r"a loss that is one number, got \(5, 8\)"):
        jprune.shrink_function(network, params, batches, Target(units=0.5), where="down")
    with pytest.raises(JpruneError, match="matches none"):
        jprune.shrink_function(network, params, batches, Target(units=0.5), criterion="l2", where="nowhere")
