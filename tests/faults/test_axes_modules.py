"""Masked is smaller, for Linen and NNX modules: the smaller function is the module built with smaller sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from smaller import agree, random_keep

from jprune.trace import coupled_axes

few = functools.partial(settings, deadline=None, derandomize=True, phases=[Phase.generate])
SIZE = st.integers(2, 5)


class LinenTransformer(nn.Module):
    """Multi-head attention in reshape style; every size is written in the module."""

    d: int
    heads: int
    head_dim: int
    d_ff: int
    norm: type = nn.LayerNorm
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, self.d, name="embed")
        x = embed(tokens)
        h = self.norm(name="norm1")(x)
        width = self.heads * self.head_dim
        q, k, v = (nn.Dense(width, name=n)(h).reshape(*h.shape[:2], self.heads, self.head_dim) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.float32(np.sqrt(self.head_dim))
        weights = nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9))
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(*h.shape[:2], width)
        x = x + nn.Dense(self.d, name="o")(mixed)
        h = nn.Dense(self.d_ff, name="up")(self.norm(name="norm2")(x))
        x = x + nn.Dense(self.d, name="down")(nn.gelu(h))
        x = self.norm(name="final")(x)
        return embed.attend(x) if self.tied else nn.Dense(11, name="head")(x)


def random_like(rng, shapes):
    """Parameters of the order of one, so that no norm and no bias is trivial."""
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) + 0.3, x.dtype), shapes)


def size(groups, keep, path, axis):
    """How long an axis is once the units are dropped."""
    return int(np.prod([keep[g.name].sum() if g.name in keep else g.size for g in groups.at(path, axis)], dtype=int))


@few(max_examples=4)
@given(d=SIZE, heads=SIZE, d_ff=SIZE, norm=st.sampled_from([nn.LayerNorm, nn.RMSNorm]), tied=st.booleans(), seed=SIZE)
def test_linen_transformer(d, heads, d_ff, norm, tied, seed):
    rng = np.random.default_rng(seed)
    sizes = {"d": d + 20, "heads": heads + 1, "head_dim": 7, "d_ff": d_ff + 10}  # none a power of another
    model = LinenTransformer(**sizes, norm=norm, tied=tied)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 4)))
    params = random_like(rng, jax.eval_shape(model.init, jax.random.key(0), tokens))
    groups = coupled_axes(model.apply, params, tokens)
    keep = random_keep(groups, rng)
    hidden, heads_group, v_dim = (
        groups.at("params/embed/embedding", 1)[0],
        groups.at("params/k/bias", 0)[0],
        groups.at("params/v/bias", 0)[1],
    )
    assert hidden.frozen is None
    assert hidden.renormalised
    assert heads_group.frozen is None
    assert {m.path for m in heads_group.members} == {
        f"params/{n}" for n in ("q/kernel", "k/kernel", "v/kernel", "q/bias", "k/bias", "v/bias", "o/kernel")
    }
    assert groups["params/down/kernel[0]"].frozen is None
    assert all(g.proven for g in (hidden, heads_group, groups["params/down/kernel[0]"]))
    assert "comes from its length" in groups.at("params/k/bias", 0)[1].frozen
    assert "comes from its length" in v_dim.frozen  # this module has one head_dim for queries, keys and values
    if not keep:
        keep = {hidden.name: np.arange(hidden.size) > 1}
    small = LinenTransformer(
        d=size(groups, keep, "params/embed/embedding", 1),
        heads=size(groups, keep, "params/k/bias", 0) // 7,
        head_dim=7,
        d_ff=size(groups, keep, "params/down/kernel", 0),
        norm=norm,
        tied=tied,
    )
    agree(model.apply, params, (tokens,), groups, keep, small.apply)


class NNXTransformer(nnx.Module):
    """Grouped-query attention in reshape style, queries, keys and values from one kernel, parallel residual."""

    def __init__(self, d, kv_heads, per_kv, d_ff, norm, *, head_dim=6, rngs):
        self.kv_heads, self.per_kv, self.head_dim = kv_heads, per_kv, head_dim
        heads = kv_heads * per_kv
        self.norm, self.final = norm(d, rngs=rngs), norm(d, rngs=rngs)
        self.embed = nnx.Embed(11, d, rngs=rngs)
        self.qkv = nnx.Linear(d, (heads + 2 * kv_heads) * head_dim, use_bias=False, rngs=rngs)
        self.o = nnx.Linear(heads * head_dim, d, rngs=rngs)
        self.gate_up = nnx.Linear(d, 2 * d_ff, rngs=rngs)
        self.down = nnx.Linear(d_ff, d, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x)
        time = x.shape[1]
        kv, width = self.kv_heads * self.head_dim, self.kv_heads * self.per_kv * self.head_dim
        q, k, v = jnp.split(self.qkv(h), [width, width + kv], -1)
        q = q.reshape(-1, time, self.kv_heads, self.per_kv, self.head_dim)
        k, v = (a.reshape(-1, time, self.kv_heads, self.head_dim) for a in (k, v))
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, k)
        mixed = jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(scores), v).reshape(-1, time, width)
        gate, up = jnp.split(self.gate_up(h), 2, -1)
        x = x + self.o(mixed) + self.down(jax.nn.silu(gate) * up)
        return self.embed.attend(self.final(x))


@few(max_examples=4)
@given(
    d=SIZE,
    kv_heads=st.integers(1, 3),
    per_kv=st.integers(1, 3),
    d_ff=SIZE,
    norm=st.sampled_from([nnx.LayerNorm, nnx.RMSNorm]),
    seed=SIZE,
)
def test_nnx_transformer(d, kv_heads, per_kv, d_ff, norm, seed):
    rng = np.random.default_rng(seed)

    def module(*sizes, head_dim=6):
        model = functools.partial(NNXTransformer, *sizes, norm, head_dim=head_dim)
        graph, state = nnx.split(nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0))))
        return (lambda state, tokens: nnx.merge(graph, state)(tokens)), state

    f, shapes = module(d + 20, kv_heads, per_kv, d_ff)
    params = random_like(rng, shapes)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 4)))
    groups = coupled_axes(f, params, tokens)
    keep = random_keep(groups, rng)
    assert groups.at("embed/embedding", 1)[0].renormalised
    (channels,) = groups.at("down/kernel", 0)
    assert channels.proven
    fused = [m for m in channels.members if m.path == "gate_up/kernel"]
    assert sorted(p for m in fused for p in channels.positions(m, [0])) == [0, d_ff]
    for dim in (groups.at("qkv/kernel", 1)[-1], groups.at("o/kernel", 0)[-1]):
        assert dim.proven == (per_kv == 1)  # the kernel is split into equal parts, which are one group
        assert dim.proven or "which must keep equally many" in dim.evidence
    keep = {name: mask for name, mask in keep.items() if groups[name].size != 6}  # one head_dim in this module
    if not keep:
        keep = {channels.name: np.arange(channels.size) > 0}
    of = [g for g in groups.at("o/kernel", 0) if g.size != 6]
    left = {g.name: keep[g.name].sum() if g.name in keep else g.size for g in of}
    counts = list(left.values())
    if kv_heads > 1:
        assert groups.at("o/kernel", 0)[0].frozen is None
    small_kv = counts.pop(0) if kv_heads > 1 else 1
    small_per = counts.pop(0) if per_kv > 1 else 1
    small, _ = module(
        size(groups, keep, "embed/embedding", 1), int(small_kv), int(small_per), size(groups, keep, "down/kernel", 0)
    )
    agree(f, params, (tokens,), groups, keep, small)


class ConvNet(nnx.Module):
    """Convolutions, one of them depthwise, batch statistics, pooling, a residual connection."""

    def __init__(self, width, hidden, *, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.stem = conv(3, width)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.depthwise = conv(width, width, feature_group_count=width)
        self.up = nnx.Conv(width, hidden, kernel_size=(1, 1), rngs=rngs)
        self.down = conv(hidden, width, strides=2, padding="VALID")
        self.head = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.stem(x)))
        x = x + self.depthwise(x)
        x = nnx.max_pool(x, (2, 2), strides=(1, 1))
        x = self.down(jax.nn.silu(self.up(x)))
        return self.head(x.mean((1, 2)))


@few(max_examples=3)
@given(width=SIZE, hidden=SIZE, seed=SIZE)
def test_convolutions(width, hidden, seed):
    rng = np.random.default_rng(seed)

    def module(width, hidden):
        graph, state = nnx.split(nnx.eval_shape(lambda: ConvNet(width, hidden, rngs=nnx.Rngs(0))))
        return (lambda state, x: nnx.merge(graph, state)(x)), state

    f, shapes = module(width, hidden)
    params = jax.tree.map(jnp.abs, random_like(rng, shapes))  # a variance is not negative
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 3)), jnp.float32)
    groups = coupled_axes(f, params, x)
    (features,) = groups.at("stem/kernel", 3)
    assert features.frozen is None
    assert {(m.path, m.axis) for m in features.members} >= {("depthwise/kernel", 3), ("norm/mean", 0), ("up/kernel", 2)}
    (inner,) = groups.at("up/kernel", 3)
    assert inner.frozen is None
    (last,) = groups.at("head/kernel", 0)
    assert last.frozen is None
    keep = random_keep(groups, rng)

    def left(group):
        return int(keep[group.name].sum()) if group.name in keep else group.size

    keep.pop(last.name, None)  # this module has one width
    if not keep:
        keep = {inner.name: np.arange(inner.size) > 0}

    def small(state, x):  # the convolutions with the sizes of their kernels
        g, full = nnx.split(nnx.eval_shape(lambda: ConvNet(left(features), left(inner), rngs=nnx.Rngs(0))))
        del full
        return nnx.merge(g, state)(x)

    agree(f, params, (x,), groups, keep, small)


class Recurrent(nn.Module):
    """A scan over time inside a scan over layers, the layers' parameters stacked."""

    layers: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        shapes = self.shapes(x.shape[-1])
        p = {n: self.param(n, nn.initializers.normal(1.0), (self.layers, *s)) for n, s in shapes.items()}

        def layer(x, p):
            def step(state, row):
                state = jnp.tanh(row @ p["input"] + state @ p["recurrent"] + p["bias"])
                return state, state @ p["output"]

            _, y = jax.lax.scan(step, jnp.zeros((x.shape[1], self.hidden)), x)
            mean = (x * x).mean(-1, keepdims=True)
            return x * jax.lax.rsqrt(mean + 0.1) + y, None

        return jax.lax.scan(layer, x @ self.param("in", nn.initializers.normal(1.0), (x.shape[-1], x.shape[-1])), p)[0]

    def shapes(self, d):
        h = self.hidden
        return {"input": (d, h), "recurrent": (h, h), "bias": (h,), "output": (h, d)}


def test_scans(rng):
    x = jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32)
    model = Recurrent(3, 5)
    params = random_like(rng, jax.eval_shape(model.init, jax.random.key(0), x))
    groups = coupled_axes(model.apply, params, x)
    (hidden,) = groups.at("params/recurrent", 1)
    assert hidden.frozen is None
    assert groups.at("params/recurrent", 2) == (hidden,)
    assert "scanned over" in groups.at("params/bias", 0)[0].frozen
    mask = np.array([True, False, True, True, False])
    agree(model.apply, params, (x,), groups, {hidden.name: mask}, Recurrent(3, 3).apply)


def test_a_mean_in_a_scan(rng):
    """The masked form reaches into the body."""

    def f(p, tokens):
        def layer(x, p):
            h = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1) * p["scale"]
            return x + jnp.tanh(h @ p["up"]) @ p["down"], None

        return jax.lax.scan(layer, p["embed"][tokens], p["layers"])[0] @ p["embed"].T

    params = {
        "embed": (7, 5),
        "layers": {"scale": (3, 5), "up": (3, 5, 4), "down": (3, 4, 5)},
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), params, is_leaf=lambda s: isinstance(s, tuple)
    )
    tokens = jnp.arange(6).reshape(2, 3)
    groups = coupled_axes(f, params, tokens)
    assert groups["embed[1]"].renormalised
    assert groups["embed[1]"].frozen is None
    agree(f, params, (tokens,), groups, random_keep(groups, rng, [g.name for g in groups.prunable]))


@pytest.mark.parametrize("sizes", [(2, 3)])
def test_experts_in_a_batched_matmul(sizes, rng):
    """A batch axis of kernels is an axis like any other: whole experts, and each expert's channels."""
    experts, d_ff = sizes

    def f(p, x):
        gates = jax.nn.relu(x @ p["router"])
        h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
        return jnp.einsum("te,tef,efd->td", gates, h, p["down"])

    params = {"router": (4, experts), "up": (experts, 4, d_ff), "down": (experts, d_ff, 4)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in params.items()}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    groups = coupled_axes(f, params, x)
    assert [g.size for g in groups.prunable] == [experts, d_ff]
    agree(f, params, (x,), groups, random_keep(groups, rng, [g.name for g in groups.prunable]))
