"""Three decoder blocks that know nothing of jprune, each with what a forward hook sees of its matmuls' inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from remembering import Rows

D, HEADS, KV_HEADS, HEAD_DIM, D_FF = 16, 4, 2, 4, 24


@dataclasses.dataclass(frozen=True)
class Architecture:
    f: Callable
    params: Any
    x: jax.Array
    hook: Callable[[Any, jax.Array], dict[str, jax.Array]]
    """(params, x) -> {path: what the matmul against it reads}."""
    stages: list[list[str]]


def causal(scores):
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)


def plain_block(p, x, seen=None):
    """Grouped-query attention with rotary positions in reshape style, gated MLP."""
    seen = {} if seen is None else seen

    def linear(name, x):
        seen[name] = x
        return x @ p[name]

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def rotary(x):
        angles = jnp.arange(float(x.shape[1]))[:, None, None] / 100.0 ** jnp.linspace(0, 1, HEAD_DIM // 2)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1
        )

    batch, time, _ = x.shape
    h = norm(x, p["norm1"])
    q, k, v = (linear(n, h).reshape(batch, time, -1, HEAD_DIM) for n in "qkv")
    q, k = rotary(q), rotary(k)
    k, v = (jnp.repeat(a, HEADS // KV_HEADS, axis=2) for a in (k, v))
    scores = causal(jnp.einsum("bthk,bshk->bhts", q, k) / np.float32(np.sqrt(HEAD_DIM)))
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v)
    x = x + linear("o", mixed.reshape(batch, time, -1))
    h = norm(x, p["norm2"])
    return x + linear("down", jax.nn.silu(linear("gate", h)) * linear("up", h))


def plain(rng):
    shapes = {
        "q": (D, HEADS * HEAD_DIM),
        "k": (D, KV_HEADS * HEAD_DIM),
        "v": (D, KV_HEADS * HEAD_DIM),
        "o": (HEADS * HEAD_DIM, D),
        "gate": (D, D_FF),
        "up": (D, D_FF),
        "down": (D_FF, D),
        "norm1": (D,),
        "norm2": (D,),
    }
    params = {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}

    def hook(params, x):
        seen: dict[str, jax.Array] = {}
        plain_block(params, x, seen)
        return seen

    return plain_block, params, hook, [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


class LinenBlock(nn.Module):
    """Multi-head attention in reshape style, LayerNorm, biases, GELU; attention in bfloat16."""

    dense: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        batch, time, d = x.shape
        h = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(d, name=n, dtype=jnp.bfloat16)(h).reshape(batch, time, HEADS, -1) for n in "qkv")
        weights = jax.nn.softmax(causal(jnp.einsum("bthk,bshk->bhts", q, k)).astype(jnp.float32))
        mixed = jnp.einsum("bhts,bshk->bthk", weights.astype(v.dtype), v).reshape(batch, time, d)
        x = x + nn.Dense(d, name="o", dtype=jnp.bfloat16)(mixed).astype(jnp.float32)
        h = nn.Dense(D_FF, name="up")(nn.LayerNorm()(x))
        return x + self.dense(d, name="down")(nn.gelu(h))


def linen(rng):
    model = LinenBlock(nn.remat(nn.Dense))
    params = model.init(jax.random.key(0), jnp.zeros((1, 3, D)))

    def hook(params, x):
        seen = {}

        def intercept(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                seen["/".join(["params", *context.module.path, "kernel"])] = args[0].astype(context.module.dtype)
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            LinenBlock().apply(params, x)  # no value leaves a remat
        return seen

    names = [["q", "k", "v"], ["o"], ["up"], ["down"]]
    return model.apply, params, hook, [[f"params/{n}/kernel" for n in stage] for stage in names]


class Hooked(nnx.LinearGeneral):
    """Keeps what it reads in a list on the class, so that the module's state stays as it is."""

    seen = None

    def __call__(self, x):
        if Hooked.seen is not None:
            Hooked.seen.append((self.kernel.get_value(), x))
        return super().__call__(x)


class NNXBlock(nnx.Module):
    """Parallel residual, head axes in the kernels, one norm for both branches."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        for name, in_features, out_features in [
            ("q", D, (HEADS, HEAD_DIM)),
            ("k", D, (HEADS, HEAD_DIM)),
            ("v", D, (HEADS, HEAD_DIM)),
            ("o", (HEADS, HEAD_DIM), D),
            ("up", D, D_FF),
            ("down", D_FF, D),
        ]:
            axis = (-2, -1) if name == "o" else -1
            setattr(self, name, Hooked(in_features, out_features, axis=axis, rngs=rngs))

    def __call__(self, x):
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        weights = jax.nn.softmax(causal(jnp.einsum("bthk,bshk->bhts", q, k)))
        attended = self.o(jnp.einsum("bhts,bshk->bthk", weights, v))
        return x + attended + self.down(jax.nn.relu(self.up(h)))


def from_nnx(rng):
    graph, state = nnx.split(NNXBlock(nnx.Rngs(0)))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    def hook(state, x):
        module = nnx.merge(graph, state)
        Hooked.seen = []
        module(x)
        seen, Hooked.seen = Hooked.seen, None
        names = ["q", "k", "v", "o", "up", "down"]
        return {f"{name}/kernel": x for name, (_, x) in zip(names, seen, strict=True)}

    return apply, state, hook, [["q/kernel", "k/kernel", "v/kernel", "up/kernel"], ["o/kernel", "down/kernel"]]


@pytest.fixture(params=[plain, linen, from_nnx], ids=lambda make: make.__name__)
def architecture(request, rng):
    f, params, hook, stages = request.param(rng)
    return Architecture(f, params, jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32), hook, stages)


@pytest.fixture
def rows():
    return Rows
