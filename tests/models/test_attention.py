"""Attention against a slow NumPy truth: windows, grouping, chunks, and positions after a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.models import attention


@pytest.fixture(params=["heads together", "one head at a time"])
def road(request, monkeypatch):
    """Both ways that sums are laid out, whatever the length."""
    monkeypatch.setattr(attention, "_one_by_one", lambda time: request.param == "one head at a time")


def reference(q, k, v, start, window, cap=None, slopes=None, sinks=None):
    """One query, one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (batch, time, heads, head_dim), kv_heads = q.shape, k.shape[2]
    out = np.zeros((batch, time, heads, v.shape[3]))
    for b in range(batch):
        for t in range(time):
            low = 0 if window is None else max(0, start + t - window + 1)
            for h in range(heads):
                shared = h // (heads // kv_heads)
                keys = k[b, low : start + t + 1, shared]
                scores = keys @ q[b, t, h] / np.sqrt(head_dim)
                if cap is not None:
                    scores = cap * np.tanh(scores / cap)
                if slopes is not None:
                    scores -= slopes[h] * np.arange(len(scores))[::-1]
                weights = np.exp(scores - scores.max())
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - scores.max()))
                out[b, t, h] = weights / total @ v[b, low : start + t + 1, shared]
    return out


def random_qkv(rng, *, time, keys, heads=4, kv_heads=2, head_dim=6):
    shapes = (2, time, heads, head_dim), (2, keys, kv_heads, head_dim), (2, keys, kv_heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize(("start", "keys"), [(0, 19), (5, 30)])
def test_is_softmax_over_what_is_visible(rng, road, monkeypatch, window, start, keys):
    monkeypatch.setattr(attention, "CHUNK", 8)  # 19 queries: two whole chunks and a rest
    q, k, v = random_qkv(rng, time=19, keys=keys)
    ours = jax.jit(lambda: attention.attend(q, k, v, start=start, window=window))()
    np.testing.assert_allclose(ours, reference(q, k, v, start, window), atol=2e-6)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_start_that_is_not_known_while_tracing(rng, window):
    q, k, v = random_qkv(rng, time=19, keys=30)
    ours = jax.jit(lambda at: attention.attend(q, k, v, start=at, window=window))
    for start in (0, 5):
        np.testing.assert_allclose(ours(start), reference(q, k, v, start, window), atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_query_heads_share_key_heads_in_order(rng, road, heads, kv_heads):
    q, k, v = random_qkv(rng, time=5, keys=5, heads=heads, kv_heads=kv_heads)
    ours = jax.jit(attention.attend)(q, k, v)
    np.testing.assert_allclose(ours, reference(q, k, v, 0, None), atol=2e-6)


@pytest.mark.parametrize(("cap", "slopes"), [(2.0, None), (None, (0.5, 0.25, 0.1, 0.0))])
def test_caps_and_slopes(rng, road, monkeypatch, cap, slopes):
    monkeypatch.setattr(attention, "CHUNK", 8)
    q, k, v = random_qkv(rng, time=19, keys=22)
    ours = jax.jit(lambda *x: attention.attend(*x, start=3, window=9, cap=cap, slopes=slopes))(q, k, v)
    np.testing.assert_allclose(ours, reference(q, k, v, 3, 9, cap, slopes), atol=2e-6)


@pytest.mark.parametrize("start", [3, "not known while tracing"])
def test_sinks_take_a_share_of_what_is_seen(rng, road, monkeypatch, start):
    """Whatever its size: little of large scores, nearly all of small ones."""
    monkeypatch.setattr(attention, "CHUNK", 8)
    q, k, v = random_qkv(rng, time=19, keys=22)
    sinks = jnp.asarray([-9.0, 0.0, 2.0, 60.0])

    def f(at, *x):
        return attention.attend(*x, start=start if start == 3 else at, window=9, sinks=sinks)

    ours = jax.jit(f)(3, q, k, v)
    np.testing.assert_allclose(ours, reference(q, k, v, 3, 9, sinks=sinks), atol=2e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_long_sequences_have_few_programs_and_the_same_sums(rng, monkeypatch, most):
    """Segments of several chunks, and a rest; gradients too, against those of the other way."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    monkeypatch.setattr(attention, "MAX_CHUNKS", most)
    q, k, v = random_qkv(rng, time=30, keys=30)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)

    def results(one_by_one):
        monkeypatch.setattr(attention, "_one_by_one", lambda time: one_by_one)

        def f(*x):
            out = attention.attend(*x[:3], window=21, cap=5.0, slopes=(0.5, 0.25, 0.1, 0.0), sinks=x[3])
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
        return out, *gradients

    for ours, theirs in zip(results(True), results(False), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    np.testing.assert_allclose(
        results(True)[0], reference(q, k, v, 0, 21, 5.0, (0.5, 0.25, 0.1, 0.0), sinks), atol=2e-6
    )


def test_number_of_chunks_is_bounded(rng, road, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 1)
    q, k, v = random_qkv(rng, time=50, keys=50)
    products = str(jax.make_jaxpr(attention.attend)(q, k, v)).count("dot_general")
    assert products <= 2 * attention.MAX_CHUNKS


def test_keys_and_values_are_not_repeated_for_each_query_head():
    q, k = jnp.zeros((1, 4, 8, 6)), jnp.zeros((1, 4, 2, 6))
    jaxpr = jax.make_jaxpr(attention.attend)(q, k, k)
    inputs = [v.aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.invars]
    assert sum(shape == (1, 4, 2, 6) for shape in inputs) == 2


def test_cache_extends_in_place_of_its_free_room():
    cache = attention.Cache.empty(1, 6, 2, 4, jnp.float32)
    ones = jnp.ones((1, 2, 2, 4))
    cache = cache.extend(ones, 2 * ones).extend(3 * ones, 4 * ones)
    assert cache.length == 4
    np.testing.assert_array_equal(cache.keys[0, :, 0, 0], [1, 1, 3, 3, 0, 0])
    np.testing.assert_array_equal(cache.values[0, :, 1, 3], [2, 2, 4, 4, 0, 0])
