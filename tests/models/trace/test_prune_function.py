"""Whole functions pruned in one call, against loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune import NM, JpruneError, Magnitude, SparseGPT, Unstructured, Wanda
from jprune.statistics import Gram
from jprune.trace import report


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


P = {
    "up": normal(0, 3, 8, 16) / 3,
    "down": normal(1, 3, 16, 8) / 4,
    "bias": normal(2, 3, 8) / 4,
    "head": normal(3, 8, 8),
}
BATCHES = [(normal(i, 12, 4) @ normal(9, 4, 8),) for i in (4, 5, 6)]


def layer(x, w):
    return x + jax.nn.relu(x @ w["up"]) @ w["down"] + w["bias"]


def scanned(p, x):
    x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, {k: p[k] for k in ("up", "down", "bias")})
    return x @ p["head"]


def by_hand(pattern):
    """Layer by layer, kernel by kernel, with the pruned weights of those before."""
    p, xs = dict(P), [x for (x,) in BATCHES]

    def prune(kernel, inputs):
        gram = sum(np.asarray(x).T @ np.asarray(x) for x in inputs)
        return jprune.solvers.sparsegpt(kernel, jnp.asarray(gram), pattern)

    for i in range(3):
        up = prune(P["up"][i], xs)
        hidden = [jax.nn.relu(x @ up.kernel) for x in xs]
        down = prune(P["down"][i], hidden)
        xs = [x + h @ down.kernel + P["bias"][i] for x, h in zip(xs, hidden)]
        p |= {"up": p["up"].at[i].set(up.kernel), "down": p["down"].at[i].set(down.kernel)}
    return p | {"head": prune(P["head"], xs).kernel}


@pytest.mark.parametrize("between", ["recompute", "keep"])
def test_a_scan_over_layers_is_pruned_layer_by_layer(between):
    told = []
    pruned, masks = jprune.prune_function(
        scanned, P, BATCHES, SparseGPT(), Unstructured(0.5), between=between, tell=lambda *t: told.append(t)
    )
    expected = by_hand(Unstructured(0.5))
    for name in P:
        np.testing.assert_allclose(pruned[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert masks.keys() == {"up", "down", "head"}
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.asarray(pruned[name]) != 0)
        counts = np.sum(~np.asarray(mask).reshape(-1, *mask.shape[-2:]), axis=(1, 2))
        assert set(counts) == {mask.shape[-1] * mask.shape[-2] // 2}
    assert told == [(i, 7, (("up", "down")[i % 2],)) for i in range(6)] + [(6, 7, ("head",))]


def test_all_at_once_sees_the_dense_function():
    pruned, _ = jprune.prune_function(scanned, P, BATCHES, Wanda(), NM(2, 4), sequential=False)
    x = jnp.concatenate([x for (x,) in BATCHES])
    for i in range(3):
        expected, _ = jprune.prune(
            {"kernel": P["up"][i]}, {"kernel": gathered(x)}, Wanda(), NM(2, 4), in_axes={"kernel": (0,)}
        )
        np.testing.assert_array_equal(pruned["up"][i], expected["kernel"])
        x = layer(x, {k: P[k][i] for k in ("up", "down", "bias")})


def test_devices_share_the_batches():
    mesh = jax.make_mesh((4, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    alone, _ = jprune.prune_function(layered, P, BATCHES, Wanda(), Unstructured(0.5))
    shared, _ = jprune.prune_function(layered, P, BATCHES, Wanda(), Unstructured(0.5), mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, shared)


def layered(p, x):
    return jnp.tanh(x @ p["up"][0]) @ p["down"][0]


def gathered(x):
    return jprune.SquaredNorm.zeros(x.shape[1]).update(x)


def test_a_kernel_of_several_stages_is_pruned_once():
    """As in ALBERT: by all that it reads in the dense function, before anything else."""

    def albert(p, x):
        for _ in range(2):
            x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return x @ p["head"]

    p = {"up": P["up"][0], "down": P["down"][0], "head": P["head"]}
    pruned, masks = jprune.prune_function(albert, p, BATCHES, SparseGPT(), Unstructured(0.5))
    assert all(int(jnp.sum(~m)) == m.size // 2 for m in masks.values())
    grams = [jprune.observe(albert, Gram)(p, *args)[1] for args in BATCHES]
    total = grams[0].merge(grams[1]).merge(grams[2])
    expected, _ = jprune.prune(p, total, SparseGPT(), Unstructured(0.5), where="up|down")
    np.testing.assert_allclose(pruned["up"], expected["up"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pruned["down"], expected["down"], rtol=1e-4, atol=1e-5)


def test_magnitude_needs_no_batches_to_observe():
    pruned, masks = jprune.prune_function(scanned, P, BATCHES, Magnitude(), NM(2, 4))
    assert masks.keys() == {"up", "down", "head"}
    kept = np.asarray(pruned["up"]).reshape(3, 2, 4, 16) != 0
    assert (kept.sum(axis=2) == 2).all()


def test_what_is_refused():
    with pytest.raises(JpruneError, match="at least one batch"):
        jprune.prune_function(scanned, P, [], Wanda(), Unstructured(0.5))
    with pytest.raises(JpruneError, match="more than once"):
        jprune.prune_function(scanned, P, iter(BATCHES), Wanda(), Unstructured(0.5))

    for method in (Magnitude(), Wanda()):
        with pytest.raises(JpruneError, match="kernels that can be pruned, found none"):
            jprune.prune_function(lambda p, x: x + p["bias"][0], P, BATCHES, method, Unstructured(0.5))
    with pytest.raises(JpruneError, match="expected weights for each batch"):
        jprune.prune_function(layered, P, BATCHES, Wanda(), Unstructured(0.5), weights=[jnp.ones(12)])

    def looped(p, x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: jnp.abs(x @ p["head"]), x)

    with pytest.raises(JpruneError, match="head used inside a loop"):
        jprune.prune_function(looped, P, BATCHES, Wanda(), Unstructured(0.5), where="head")
    _, masks = jprune.prune_function(looped, P, BATCHES, Wanda(), Unstructured(0.5), sequential=False)
    assert list(masks) == ["head"]


def test_rows_that_are_returned_are_looked_up():
    (leaf,) = report(lambda p, i: p["table"][i], {"table": P["head"]}, jnp.arange(3)).leaves
    assert (leaf.state, leaf.others[0][:9]) == ("other", "gather at")


def test_a_report_accounts_for_every_leaf():
    def f(p, tokens, x):
        x = x + p["embedding"][tokens] @ p["half"][:, :8]
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, {k: p[k] for k in ("up", "down", "bias")})
        return x @ (p["head"] * p["scale"])

    p = P | {"embedding": normal(7, 20, 6), "half": normal(8, 6, 16), "scale": jnp.ones(()), "old": jnp.ones((4, 4))}
    found = report(f, p, jnp.arange(12), BATCHES[0][0])
    assert {leaf.path: leaf.state for leaf in found.leaves} == {
        "bias": "other",
        "down": "prunable",
        "embedding": "other",
        "half": "prunable",
        "head": "skipped",
        "old": "never read",
        "scale": "other",
        "up": "prunable",
    }
    assert sum(leaf.share for leaf in found.leaves) == pytest.approx(1)
    assert found.parameters == sum(x.size for x in jax.tree.leaves(p))
    half = next(leaf for leaf in found.leaves if leaf.path == "half")
    assert (half.read, half.json()["matmuls"][0]["part"]) == (0.5, [[0, 6], [0, 8]])
    text = str(found)
    assert "50 % of it is never read" in text
    assert "a stack along [0]" in text
    assert "made by mul at" in text
    assert sum(found.json()["shares"].values()) == pytest.approx(1)
