"""Masked is smaller: random networks that read their sizes from their arrays, random groups, random units."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from smaller import agree, random_keep

from jprune.trace import coupled_axes

few = functools.partial(settings, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
SIZE = st.integers(2, 5)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 1), jnp.float32)


def rms_norm(p, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["scale"]


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def offset_norm(p, x):
    """RMSNorm as Gemma has it."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + p["scale"])


NORMS = {"rms": rms_norm, "layer": layer_norm, "offset": offset_norm}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,  # softplus(0) is not 0: the next kernel's zeros must do
    "leaky": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
}


def make_norm(rng, kind, n):
    return {"scale": normal(rng, n) + 1, **({"bias": normal(rng, n)} if kind == "layer" else {})}


def rotate(x):
    a, b = jnp.split(x, 2, -1)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * 0.3
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def attention(o, p, x):
    """[B, T, d] -> [B, T, d]; kernels [d, heads, head_dim], or one kernel for all three."""
    if o["fused"]:
        n_q, n_k = p["o"].shape[0], (p["qkv"].shape[1] - p["o"].shape[0]) // 2
        q, k, v = jnp.split(jnp.einsum("btd,dhk->bthk", x, p["qkv"]), [n_q, n_q + n_k], axis=2)
    else:
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) + p.get(n + "_bias", 0.0) for n in "qkv")
    if o["qk_norm"]:
        q, k = NORMS["rms"](p["q_norm"], q), NORMS["rms"](p["k_norm"], k)
    if o["rotary"]:
        q, k = rotate(q), rotate(k)
    if o["scale"] == "query":
        q = q / jnp.sqrt(q.shape[-1])
    groups = q.shape[2] // k.shape[2]
    if o["repeat"]:
        k, v = (jnp.repeat(a, groups, axis=2) for a in (k, v))
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
    else:
        q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, k)
    if o["scale"] == "scores":
        scores = scores * q.shape[-1] ** -0.5
    t = jnp.arange(x.shape[1])
    weights = jax.nn.softmax(jnp.where(t[:, None] >= t, scores, -jnp.inf), -1)
    if o["repeat"]:
        mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    else:
        mixed = jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(*x.shape[:2], -1, v.shape[-1])
    return jnp.einsum("bthk,hkd->btd", mixed, p["o"])


def mlp(o, p, x):
    act = ACTIVATIONS[o["activation"]]
    h = x @ p["up"] + p.get("up_bias", 0.0)
    h = act(x @ p["gate"]) * h if o["gated"] else act(h)
    return h @ p["down"]


def transformer(o, p, tokens):
    norm = NORMS[o["norm"]]
    x = jnp.take(p["embed"], tokens, axis=0)
    for block in p["blocks"]:
        if o["parallel"]:
            h = norm(block["norm1"], x)
            x = x + attention(o, block, h) + mlp(o, block, h)
        else:
            x = x + attention(o, block, norm(block["norm1"], x))
            x = x + mlp(o, block, norm(block["norm2"], x))
    return norm(p["final"], x) @ (p["embed"].T if o["tied"] else p["head"])


def make_transformer(rng, o, *, d, kv_heads, per_kv, head_dim, d_ff, layers=1):
    heads, head_dim = kv_heads * per_kv, 2 * head_dim
    params = {"embed": normal(rng, 11, d) * 3, "final": make_norm(rng, o["norm"], d), "blocks": []}
    if not o["tied"]:
        params["head"] = normal(rng, d, 11)
    for _ in range(layers):
        block = {"o": normal(rng, heads, head_dim, d), "up": normal(rng, d, d_ff), "down": normal(rng, d_ff, d)}
        if o["fused"]:
            block["qkv"] = normal(rng, d, heads + 2 * kv_heads, head_dim)
        else:
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                block[name] = normal(rng, d, n, head_dim) * 2
                if o["bias"]:
                    block[name + "_bias"] = normal(rng, n, head_dim)
        if o["qk_norm"]:
            block |= {n: make_norm(rng, "rms", head_dim) for n in ("q_norm", "k_norm")}
        if o["gated"]:
            block["gate"] = normal(rng, d, d_ff)
        if o["bias"]:
            block["up_bias"] = normal(rng, d_ff)
        block["norm1"] = make_norm(rng, o["norm"], d)
        if not o["parallel"]:
            block["norm2"] = make_norm(rng, o["norm"], d)
        params["blocks"].append(block)
    return params


OPTIONS = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(sorted(NORMS)),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "scale": st.sampled_from(["query", "scores", "none"]),
        **{k: st.booleans() for k in ("fused", "qk_norm", "rotary", "repeat", "gated", "bias", "parallel", "tied")},
    }
)


@few(max_examples=10)
@given(
    o=OPTIONS,
    sizes=st.fixed_dictionaries(
        {
            "d": st.integers(4, 9),
            "kv_heads": st.integers(1, 3),
            "per_kv": st.integers(1, 3),
            "head_dim": SIZE,
            "d_ff": SIZE,
        }
    ),
    seed=st.integers(0, 99),
)
def test_transformer(o, sizes, seed):
    """Dense and gated MLP; multi-head, grouped-query and multi-query attention; fused or not; all kinds of norms."""
    rng = np.random.default_rng(seed)
    params = make_transformer(rng, o, **sizes)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 4)))
    f = functools.partial(transformer, o)
    groups = coupled_axes(f, params, tokens)
    prunable = {m.path + str(m.axis) for g in groups.prunable for m in g.members}
    assert {"embed1", "final/scale0", "blocks/0/up1", "blocks/0/down0"} <= prunable
    assert groups.at("embed", 1)[0].renormalised
    if sizes["kv_heads"] > 1 and not (o["fused"]):
        assert "blocks/0/k1" in prunable
    agree(f, params, (tokens,), groups, random_keep(groups, rng))


LLAMA_7B = """
import jax, jax.numpy as jnp
from jprune import coupled_axes
from jprune.models import decoder, families
from jprune.runs.stopwatch import peak_memory_bytes

config = families.config({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
})
tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
groups = coupled_axes(lambda p, x: decoder.apply(config, p, x), decoder.abstract_params(config), tokens)
assert groups["blocks/0/attn/k/kernel[0]"].frozen is None
assert sum(g.size == 11008 and g.frozen is None for g in groups) == 32
print(peak_memory_bytes() / 2**30)
"""


def test_llama_7b_is_traced_without_its_weights():
    """In a process of its own, to see its memory: 13 GB of weights are never there."""
    done = subprocess.run([sys.executable, "-c", LLAMA_7B], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1
